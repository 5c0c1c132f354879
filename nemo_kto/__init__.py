"""KTO (Kahneman-Tversky Optimization) of language models on Megatron-Core, from binary feedback."""

__version__ = "0.1.0"

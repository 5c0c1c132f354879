"""KTO in plain PyTorch: losses, log-probs, metrics and their diagnosis; useful without Megatron.

Imports torch and `errors` only; groups and numbers are arguments, never a configuration. Start with `losses.py`, then
`logprobs.py`.
"""

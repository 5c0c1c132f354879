"""The model: Megatron's GPT for every family of `families/`, its attention, its experts, its adapters.

Imports `runtime` and what is below it; of files it only knows a model's config.json (`hf_config.py`) and which tensors
are stored beside it (`stored.py`), also in fewer bits (`quantised.py`). Start with `family.py`, what is
said of a family, and `gpt.py`, which builds the model of it.
"""

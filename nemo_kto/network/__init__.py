"""The model: Megatron's GPT for every family of `families/`, its attention, its experts, its adapters.

Imports `runtime` and what is below it; knows nothing of files. Start with `family.py`, what is said of a family, and
`gpt.py`, which builds the model of it.
"""

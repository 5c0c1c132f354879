"""The configuration of a run: every key, how it is composed, and what is wrong with it before anything else is read.

Imports `errors` and `quiet` only, and nothing heavier than Hydra, so that a misspelt key costs a moment. Start with
`schema.py`, the keys; `compose.py` makes them of the YAML and the command line, `checks.py` judges them.
"""

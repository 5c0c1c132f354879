"""Answers of the live model, under every layout.

Imports `kto` and what is below it. Start with `decoding.py`; `answers.py` is the callback that asks while training
goes on.
"""

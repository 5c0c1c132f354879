"""Tokens -> global batches: order, KL pairs, dealing to ranks and micro-batches, packed rows, cached log-probs.

Imports `reading` and `tokens`. Start with `packed_rows.py`, what a batch is, and `sampling.py`, what is in it.
"""

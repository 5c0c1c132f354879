"""Feedback, from files to batches: `reading/`, then `tokens/`, then `batches/`; useful without Megatron.

Imports `algorithms` and what is below it; ranks and sizes are integers, never a configuration. Start with
`reading/sources.py`; the whole way is one call of `batches/datamodule.py`.
"""

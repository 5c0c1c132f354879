"""Records -> tokens: tokenizer, chat template, where a response begins and ends, and where tokens are kept.

Imports `reading`. Start with `tokenization.py`; `cache.py` has each source tokenised once.
"""

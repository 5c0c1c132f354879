"""Folders of Hugging Face and PEFT <-> the network, one tensor at a time, and what stands beside the tensors.

Imports `network` and what is below it. Start with `import_hf.py` and `export_hf.py`; which tensor is which is said by
the families (`network/families/`).
"""

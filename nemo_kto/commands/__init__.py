"""What a user calls: one module for each command, imported when it is called (`cli.py`).

Imports everything; nothing but `cli.py` imports it. Start with `train.py`.
"""

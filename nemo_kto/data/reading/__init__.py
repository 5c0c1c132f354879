"""Files -> records: containers, formats, fields, labels, conversations.

Imports no torch and nothing of the other two parts of `data`. Start with `records.py`, what everything is read into,
and `formats.py`, the table of what people have.
"""

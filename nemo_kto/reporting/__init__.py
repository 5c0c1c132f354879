"""Log folders -> pictures and pages.

Imports `config` only, and no torch, so that it is quick. Start with `report.py`.
"""

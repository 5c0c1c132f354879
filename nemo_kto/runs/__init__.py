"""What a configuration means, settled once: model, layout, data, reference, schedule, trainer; and who a run is.

Imports everything but `reporting` and `commands`. Start with `run.py`, which puts the parts together; `resume.py`
decides what a run may go on from.
"""

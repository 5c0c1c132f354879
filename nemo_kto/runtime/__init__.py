"""What a run stands on: processes and their groups, the training loop, optimizer, checkpoints, loggers.

The only part that reads or sets Megatron's global state, and where what depends on its version is mended. Imports
`data` and what is below it. Start with `layout.py` and `parallel.py`, then `strategy.py`.
"""

from nemo_kto.runtime.versions import check_triton

check_triton()  # before a module of this package imports Megatron-Core

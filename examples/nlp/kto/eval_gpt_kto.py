"""Score held-out feedback with a checkpoint of a KTO run: loss, rewards, and how well rewards tell the labels.

python examples/nlp/kto/eval_gpt_kto.py <the keys of the run's command line>

It takes the newest checkpoint of the run, or evaluation.checkpoint, under any parallel layout, and writes
evaluation.json into the log folder. Every key is in conf/gpt_kto.yaml and explained in docs/configuration.md.
"""

# Nothing heavy at module level: Megatron's checkpoint writer starts processes that import this file again.
import sys
from pathlib import Path

if __name__ == "__main__":
    # a clone works without being installed, and its edits count where another version is
    sys.path.insert(1, str(Path(__file__).resolve().parents[3]))

    from nemo_kto.stopping import take_signals

    take_signals()  # before anything else: what comes next takes seconds

    from nemo_kto.cli import run_script

    run_script("evaluate", sys.argv[1:])

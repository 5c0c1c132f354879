"""The training command, whose processes wait where a test wants them, until it lets them go on.

PAUSE names the moment: `step 3` (rank 0 in that step, of index 3), `step 3 of 1` (rank 1), `save` (a process that
writes a checkpoint), `load` (rank 0, before the model is built), `import` (before anything heavy is imported). The
process makes a file `paused` in the folder PAUSE_FOLDER, with its process id in it, and waits for a file `go` there.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_kto.quiet import silence_startup_noise, without_wandb
from nemo_kto.stopping import take_signals
from tests.waiting import wait_until

WANTED, _, RANK = os.environ.get("PAUSE", "").partition(" of ")
FOLDER = Path(os.environ.get("PAUSE_FOLDER", "."))


def pause(moment: str) -> None:
    """Wait, in a process that is to wait at this moment."""
    mine = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID", "0")
    if moment != WANTED or mine != (RANK or "0") or (FOLDER / "paused").exists():
        return
    (FOLDER / "paused.partial").write_text(str(os.getpid()))
    (FOLDER / "paused.partial").rename(FOLDER / "paused")
    wait_until((FOLDER / "go").exists)


def pausing_in_steps() -> Any:
    """Return the callback that waits in steps."""
    from lightning.pytorch import Callback

    class PauseInStep(Callback):
        """Waits as a step begins."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            pause(f"step {trainer.global_step}")

    return PauseInStep()


def pause_in_saves() -> None:
    """Let the processes that write checkpoints wait."""
    from nemo_kto.runtime import megatron_fixes

    write = megatron_fixes._write_preloaded_data

    def write_later(*arguments: Any, **keywords: Any) -> None:
        pause("save")
        write(*arguments, **keywords)

    megatron_fixes._write_preloaded_data = write_later


def main() -> None:
    """Run the command."""
    pause("import")
    silence_startup_noise()
    with without_wandb():
        from nemo_kto.commands import train as training
        from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel

    pause_in_saves()
    configure = MegatronGPTKTOModel.configure_model

    def configure_later(model: MegatronGPTKTOModel) -> None:
        pause("load")
        configure(model)

    MegatronGPTKTOModel.configure_model = configure_later  # type: ignore[method-assign]
    training.train = functools.partial(training.train, callbacks=[pausing_in_steps()])  # type: ignore[assignment]
    from nemo_kto.cli import run_script

    run_script("train", sys.argv[1:])


if __name__ == "__main__":
    take_signals()
    main()

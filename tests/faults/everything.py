"""Imports what any command imports, for a process that commands are forked from."""

from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise, without_wandb

silence_startup_noise()
with without_wandb():
    from nemo_kto.commands import (  # noqa: F401
        cache_reference,
        checkpoint,
        data,
        doctor,
        evaluate,
        export,
        generate,
        report,
        train,
    )
silence_loaded_packages()

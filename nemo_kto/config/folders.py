"""Names of files in a log folder that one part of the package writes and another reads."""

from __future__ import annotations

from pathlib import Path

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import CheckpointError, ConfigError

FACTS_FILE = "run.json"
"""What a run is; also in the folder that every checkpoint gets a copy of."""

ANSWERS_FILE = "generations.jsonl"
"""What policy and reference answered to prompts."""

STOP_FILE = "STOP"
"""Made by a person in the log folder, it ends the run after the step."""

HANG_FOLDER = "hang"
"""Where the ranks of a run that hangs are, as Python stacks."""

HUB_FILE = "hub.json"
"""What was uploaded to the Hugging Face Hub."""

PROFILE_FOLDER = "profile"
"""Traces of the steps that `trainer.profile_steps` names."""

DIVERGED_FILE = "diverged.jsonl"
"""The records of steps whose loss or gradient was not finite."""


RECIPE = "recipe"
"""A folder of configurations beside gpt_kto.yaml: `recipe=NAME` takes one of them, and other overrides win over it."""


def config_dir() -> Path:
    """Return the folder of gpt_kto.yaml: of the clone, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def recipes() -> dict[str, str]:
    """Return the name of each recipe -> its first line below Hydra's."""
    files = sorted((config_dir() / RECIPE).glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ") for file in files}


def log_directory(config: KTOConfig) -> Path:
    """Return the folder of the run's logs, checkpoints and export."""
    manager = config.exp_manager
    return log_folder(manager.explicit_log_dir, manager.exp_dir, manager.name)


def log_folder(explicit: str | None, exp_dir: str | None, name: str) -> Path:
    """Return the folder that these keys of `exp_manager` mean."""
    return Path(explicit or Path(exp_dir or "results") / name).absolute()


def log_directory_key(config: KTOConfig) -> str:
    """Return the key that says where that is."""
    return "exp_manager.exp_dir" if config.exp_manager.explicit_log_dir is None else "exp_manager.explicit_log_dir"


def written_folders(config: KTOConfig, command: str) -> dict[str, Path]:
    """Return key -> folder of all that a command writes to.

    Args:
        config: The configuration.
        command: Name of a module of `nemo_kto.commands`.
    """
    data, reference = config.model.data, config.model.kto.reference
    folders = {log_directory_key(config): log_directory(config)}
    if data.cache_dir is not None:
        folders["model.data.cache_dir"] = Path(data.cache_dir).absolute()
    if reference.cache_dir is not None:
        folders["model.kto.reference.cache_dir"] = Path(reference.cache_dir).absolute()
    if command == "train" and config.export.enabled and config.export.folder is not None:
        folders["export.folder"] = Path(config.export.folder).absolute().parent
    if command == "evaluate" and config.evaluation.output is not None:
        folders["evaluation.output"] = Path(config.evaluation.output).absolute().parent
    return folders


def export_directory(config: KTOConfig) -> Path:
    """Return the folder the aligned model is written to."""
    return Path(config.export.folder or log_directory(config) / "hf").absolute()


def export_folder(config: KTOConfig, *, resumes: bool) -> Path | None:
    """Return the folder the aligned model will be written to; None if the run writes none.

    Only a resumed run may replace a folder, and only the one in its own log folder.

    Raises:
        ConfigError: The folder holds something else.
    """
    if not config.export.enabled:
        return None
    folder = export_directory(config)
    sources = {path.resolve() for path in (tokenizer_folder(config), model_folder(config)) if path is not None}
    ours = resumes and config.export.folder is None and folder.resolve() not in sources
    if not ours and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"The aligned model would be written to {folder}, which is not empty. Name another folder with "
            "export.folder or exp_manager.explicit_log_dir, or remove it."
        )
    return folder


def tokenizer_folder(config: KTOConfig) -> Path:
    """Return the folder of the tokenizer; a ConfigError if there is none."""
    folder = config.model.tokenizer.path or config.pretrained_checkpoint.restore_from_path
    if folder is None:
        raise ConfigError(
            "There is no tokenizer. Set pretrained_checkpoint.restore_from_path to a Hugging Face folder, or, for a "
            "model with random weights, model.tokenizer.path."
        )
    return Path(folder)


def model_folder(config: KTOConfig) -> Path | None:
    """Return the Hugging Face folder training starts from; None for random weights."""
    folder = config.pretrained_checkpoint.restore_from_path
    return Path(folder) if folder else None


def link_out_of(folder: Path, *, below: bool = False) -> Path | None:
    """Return a link in `folder` that leads out of it; None if there is none.

    Files of the Hugging Face hub's cache are links to blobs beside their snapshot, which is where they belong.

    Args:
        folder: The folder.
        below: Whether folders in it are looked through, too.
    """
    root = folder.resolve()
    allowed = root.parent.parent if root.parent.name == "snapshots" else root
    links = (path for path in (root.rglob("*") if below else root.iterdir()) if path.is_symlink())
    return next((link for link in links if not link.resolve().is_relative_to(allowed)), None)


def check_links(folder: Path) -> None:
    """Raise a CheckpointError for a link that leads out of a folder that somebody else may have made."""
    link = link_out_of(folder)
    if link is not None:
        raise CheckpointError(
            f"{link} is a link to {link.resolve()}, out of its folder, which is not followed. Name the folder that it "
            "leads to, or put the file itself there."
        )


def check_named_folders(config: KTOConfig) -> None:
    """Raise a CheckpointError for a folder that is none, or that a link leads out of; their files come later."""
    model = config.model
    adapter = model.peft.lora_tuning.restore_from_path
    for key, folder, file in (
        ("model.kto.reference.checkpoint", model.kto.reference.checkpoint, "config.json or adapter_config.json"),
        ("model.peft.lora_tuning.restore_from_path", adapter, "adapter_config.json"),
    ):
        if folder is not None and not Path(folder).is_dir():
            raise CheckpointError(f"{key}={folder} is not a folder. Name the one that {file} is in.")
    for named in (tokenizer_folder(config), model_folder(config), model.kto.reference.checkpoint, adapter):
        if named is not None and Path(named).is_dir():
            check_links(Path(named))

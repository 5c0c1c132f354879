"""`nemo-kto recipes`: the configurations of conf/recipe, which `recipe=NAME` takes."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from nemo_kto.config.compose import config_dir
from nemo_kto.config.overrides import RECIPE
from nemo_kto.errors import ConfigError


def run(options: argparse.Namespace) -> None:
    """Print the names and first lines of all recipes, or one of them whole."""
    console = Console(soft_wrap=True, highlight=False)
    if options.name is not None:
        console.print(_text(options.name), end="", markup=False)
        return
    if options.json:
        print(json.dumps(recipes()))
        return
    for name, title in recipes().items():
        console.print(f"{name:24} {title}", markup=False)
    console.print(
        "nemo-kto recipes NAME prints one; nemo-kto train recipe=NAME ... takes it, and other keys win over it."
    )


def recipes() -> dict[str, str]:
    """Return the name of each recipe -> its first line below Hydra's."""
    files = sorted((config_dir() / RECIPE).glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ") for file in files}


def _text(name: str) -> str:
    file = config_dir() / RECIPE / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"There is no recipe {name}. There are: {', '.join(recipes())}.")
    return file.read_text(encoding="utf-8")

"""`nemo-kto recipes`: the configurations of conf/recipe, which `recipe=NAME` takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

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
    recipes = dict(_recipes())
    if options.json:
        print(json.dumps(recipes))
        return
    for name, title in recipes.items():
        console.print(f"{name:24} {title}", markup=False)
    console.print(
        "nemo-kto recipes NAME prints one; nemo-kto train recipe=NAME ... takes it, and other keys win over it."
    )


def _recipes() -> Iterator[tuple[str, str]]:
    """Yield the name of each recipe, and its first line below Hydra's."""
    for file in sorted((config_dir() / RECIPE).glob("*.yaml")):
        yield file.stem, file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")


def _text(name: str) -> str:
    file = config_dir() / RECIPE / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"There is no recipe {name}. There are: {', '.join(dict(_recipes()))}.")
    return file.read_text(encoding="utf-8")

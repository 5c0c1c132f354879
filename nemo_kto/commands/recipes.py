"""`nemo-kto recipes`: the configurations of conf/recipe, which `recipe=NAME` takes."""

from __future__ import annotations

import argparse
import json

from nemo_kto.config.folders import RECIPE, config_dir, recipes
from nemo_kto.errors import ConfigError


def run(options: argparse.Namespace) -> None:
    """Print the names and first lines of all recipes, or one of them whole.

    Raises:
        ConfigError: There is no such recipe.
    """
    known = recipes()
    if options.name is not None:
        if options.name not in known:
            raise ConfigError(f"There is no recipe {options.name}. There are: {', '.join(known)}.")
        print((config_dir() / RECIPE / f"{options.name}.yaml").read_text(encoding="utf-8"), end="")
    elif options.json:
        print(json.dumps(known))
    else:
        for name, title in known.items():
            print(f"{name:24} {title}")
        print("\nnemo-kto recipes NAME prints one; nemo-kto train recipe=NAME ... takes it, and other keys win.")

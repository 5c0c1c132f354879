"""What other people's code a configuration names by dotted path: callbacks, a reader of data, a loss."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from nemo_kto.config.schema import KTOConfig, KTOLossConfig
from nemo_kto.errors import ConfigError

LOSSES = ("kto", "apo_zero_unpaired", "bco")
"""Values of `model.kto.loss` that are this package's own."""


def check_plugins(config: KTOConfig) -> None:
    """Raise a ConfigError when something that the configuration names by dotted path is not there, or no function."""
    for number, callback in enumerate(config.trainer.callbacks or ()):
        load_object(callback["_target_"], key=f"trainer.callbacks[{number}]._target_")
    if config.model.data.reader is not None:
        load_function(config.model.data.reader, key="model.data.reader")
    if config.model.kto.loss not in LOSSES:
        load_loss(config.model.kto)


def load_loss(kto: KTOLossConfig) -> Callable[..., Any]:
    """Return the loss that `model.kto.loss` names by dotted path.

    Raises:
        ConfigError: It is not there, or cannot be called as those of `algorithms/losses.py` are.
    """
    function = load_function(kto.loss, key="model.kto.loss")
    arguments = ("log_ratios", "desirable", "baseline")
    keywords = ("beta", "desirable_weight", "undesirable_weight")
    try:
        inspect.signature(function).bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        raise ConfigError(
            f"model.kto.loss={kto.loss} has to take {', '.join(arguments)} and the keywords {', '.join(keywords)} "
            f"({error}). See docs/losses.md."
        ) from error
    return function


def load_function(path: str, *, key: str) -> Callable[..., Any]:
    """Return the function that a dotted path names; see `load_object`."""
    found = load_object(path, key=key)
    if not callable(found):
        raise ConfigError(f"{key}={path} is no function, but of type {type(found).__name__}.")
    function: Callable[..., Any] = found
    return function


def load_object(path: str, *, key: str) -> Any:
    """Return what a dotted path `package.module.name` names.

    Modules are looked for where Python looks, and then in the current folder.

    Args:
        path: The path.
        key: The configuration key that it is the value of, for messages.

    Raises:
        ConfigError: It is not there; the message says what was looked for.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not name.isidentifier():
        raise ConfigError(f"{key}={path} is no dotted path, such as my_package.my_module.my_name.")
    here = os.getcwd()
    if here not in sys.path:  # last, so that nothing installed is hidden by a file that lies here
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key}={path}: there is no module {error.name!r}, neither among Python's packages nor in {here}. "
                "Install it, or add its folder to PYTHONPATH."
            ) from error
        raise ConfigError(
            f"{key}={path}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f" Did you mean {module_name}.{near[0]}?" if near else ""
        raise ConfigError(
            f"{key}={path}: the module {module_name!r} ({getattr(module, '__file__', None)}) has no {name!r}.{hint}"
        ) from error

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


def check_callbacks(config: KTOConfig) -> None:
    """Raise a ConfigError when a callback that the configuration names is not there."""
    for number, callback in enumerate(config.trainer.callbacks or ()):
        load_object(callback["_target_"], key=f"trainer.callbacks[{number}]._target_")


def check_functions(config: KTOConfig) -> None:
    """Raise a ConfigError when the reader or the loss that the configuration names is not there, or no function."""
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
    """Return what a dotted path names: `package.module.name`, or a name inside of that.

    Modules are looked for where Python looks, and then in the current folder.

    Args:
        path: The path.
        key: The configuration key that it is the value of, for messages.

    Raises:
        ConfigError: It is not there; the message says what was looked for.
    """
    if not isinstance(path, str) or path.count(".") == 0 or not all(name.isidentifier() for name in path.split(".")):
        raise ConfigError(f"{key}={path} is no dotted path, such as my_package.my_module.my_name.")
    here = os.getcwd()
    if here not in sys.path:  # last, so that nothing installed is hidden by a file that lies here
        sys.path.append(here)
    found, names = _longest_module(path, f"{key}={path}", here)
    where = found.__name__
    for name in names:
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f" Did you mean {where}.{near[0]}?" if near else ""
            file = getattr(found, "__file__", None)
            raise ConfigError(f"{key}={path}: {where}{f' ({file})' if file else ''} has no {name!r}.{hint}")
        found, where = getattr(found, name), f"{where}.{name}"
    return found


def _longest_module(path: str, what: str, here: str) -> tuple[Any, list[str]]:
    """Return the module at the beginning of a path, and the names behind it, of which there is at least one."""
    names = path.split(".")
    for number in range(len(names) - 1, 0, -1):
        module = ".".join(names[:number])
        try:
            return importlib.import_module(module), names[number:]
        except Exception as error:  # whatever the module does when it is imported
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{module}.".startswith(f"{missing}."):
                raise ConfigError(
                    f"{what}: the module {module!r} cannot be imported ({type(error).__name__}: {error})."
                ) from error
            if number == 1:
                raise ConfigError(
                    f"{what}: there is no module {module!r}, neither among Python's packages nor in {here}. Install "
                    "it, or add its folder to PYTHONPATH."
                ) from error
    raise AssertionError(path)

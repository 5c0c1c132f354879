"""Plain mappings -> dataclasses: strict about keys and types, with messages that name the key.

A configuration class is a dataclass whose fields are either configuration classes again (a section) or values:
numbers, text, `Literal` choices, lists, free mappings, and unions of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from nemo_kto.errors import ConfigError


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> type of every value below the configuration class `cls`."""
    hints = typing.get_type_hints(cls)
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            leaves |= leaf_types(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            leaves[prefix + item.name] = kind
    return leaves


def leaf_values(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of every value below `section`, an instance of a configuration class."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            leaves |= leaf_values(value, f"{prefix}{item.name}.")
        else:
            leaves[prefix + item.name] = value
    return leaves


def flatten(node: Mapping[Any, Any], known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested mappings.

    Args:
        node: Mappings in mappings.
        known: Dotted keys of all values. A mapping that is itself a value stays whole; a whole section set to null is
            left out, so that it keeps its defaults.
        prefix: What the keys of `node` begin with.

    Raises:
        ConfigError: A section has a value where its keys should be.
    """
    known = set(known)
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        below = sorted(k for k in known if k.startswith(key + "."))
        if isinstance(value, dict) and key not in known:
            leaves |= flatten(value, known, key + ".")
        elif not below:
            leaves[key] = value
        elif value is not None:
            raise ConfigError(f"{key} is a section, not a value. Set the keys below it, such as {below[0]}.")
    return leaves


def build(cls: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """Return an instance of the configuration class `cls` from dotted keys; missing ones take their defaults.

    Raises:
        ConfigError: A value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for item in dataclasses.fields(cls):
        key, kind = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(kind):
            values[item.name] = build(typing.cast(type, kind), flat, key + ".")
        elif key in flat:
            values[item.name] = convert(key, flat[key], kind)
    return cls(**values)


def convert(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, or raise a ConfigError that says what the key takes."""
    converted, fits = _as_one_of(value, options(kind))
    if fits:
        return converted
    raise ConfigError(f"{key}={value!r} is not possible. It takes {describe(kind)}.")


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key, naming the nearest of the `known` ones."""
    names = list(known)
    last = key.rsplit(".", 1)[-1]
    near = (
        [name for name in names if name.rsplit(".", 1)[-1] == last]
        or difflib.get_close_matches(key, names, n=1, cutoff=0.7)
        or [name for name in names if difflib.get_close_matches(last, [name.rsplit(".", 1)[-1]], cutoff=0.75)]
    )
    hint = f" Did you mean {near[0]}?" if near else " docs/configuration.md lists all keys."
    return f"Unknown configuration key {key}.{hint}"


def options(kind: Any) -> tuple[Any, ...]:
    """The types that a union consists of; of any other type, itself."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _as_one_of(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, bool]:
    """Return (the value as the first of some types that it fits, whether it fits one)."""
    for kind in kinds:
        converted, fits = _as_type(value, kind)
        if fits:
            return converted, True
    return value, False


def _as_type(value: Any, kind: Any) -> tuple[Any, bool]:
    """Return (the converted value, whether it fits); integers widen to floats, nothing else is converted silently."""
    origin = typing.get_origin(kind)
    if kind is type(None):
        return None, value is None
    if origin is Literal:
        return value, any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        converted = [_as_one_of(item, options(typing.get_args(kind)[0])) for item in items]
        return [item for item, _ in converted], value is not None and all(fits for _, fits in converted)
    if isinstance(value, bool):  # bool is an int to Python, but no number to a user
        return value, kind is bool
    if kind is float:
        is_number = isinstance(value, int | float) and math.isfinite(value)
        return (float(value), True) if is_number else (value, False)
    return value, isinstance(value, origin or kind)


def describe(kind: Any) -> str:
    """Return in words what values a type has."""
    if len(options(kind)) > 1:
        return " or ".join(map(describe, options(kind)))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(kind))
    if origin is list:
        lists = {
            "a number": "a list of numbers",
            "an integer": "an integer or a list of integers",
            "text": "text or a list of texts",
            "text or a mapping": "text, a mapping, or a list of these",
            "a mapping": "a mapping or a list of mappings",
        }
        items = describe(typing.get_args(kind)[0])
        return lists.get(items, f"{items}, or a list of these")
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return "null" if kind is type(None) else names[origin or kind]

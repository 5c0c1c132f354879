"""`nemo-kto plan`: which layout a job should have, and what it would take of GPUs that are not at hand."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from nemo_kto.config.compose import load_config
from nemo_kto.config.folders import RECIPE
from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.planning.page import as_json, as_text
from nemo_kto.planning.search import RECOMPUTE, SHORT, Found, Keys, Plan, Planner
from nemo_kto.runs.memory import step_memory
from nemo_kto.runtime.devices import DEVICES, Device

_SHOWN = 5
"""Layouts that are printed."""

_NODE = 8
"""GPUs of a node, unless something else is said."""


def run(options: argparse.Namespace) -> None:
    """Print what a layout takes, or the best of all; exit code 1 if none fits."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a dry run needs no GPU, and must not find one
    model = _model(options.model)
    given = _overrides(options)
    planner = _planner(options, model, given)
    if options.layout is not None or RECIPE in given:  # a recipe has a layout
        keys = {} if options.layout is None else _keys_of(options.layout)
        plans = [_traced(planner, planner.plan(keys))]
        found = Found(fitting=[], too_large=[], refused={})
    else:
        found = planner.search(_fixed(given))
        plans = _best(planner, found)
    plans_and_overrides = [(plan, _pasted(planner, plan, given)) for plan in plans]
    if options.json:
        print(json.dumps(as_json(planner, plans_and_overrides)))
    else:
        print(as_text(planner, plans_and_overrides, found))
    if not any(planner.fits(plan) for plan in plans):
        raise SystemExit(1)


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """Return the keys that are given, by options or as KEY=VALUE, which wins."""
    folder = options.model.parent if options.model.is_file() else options.model
    given = {"pretrained_checkpoint.restore_from_path": str(folder)}
    recipes = any(override.lstrip("+").startswith(f"{RECIPE}=") for override in options.overrides)
    for key, value in (
        ("trainer.precision", options.precision or (None if recipes else "bf16-mixed")),
        ("model.data.seq_length", options.seq_length),
        ("model.global_batch_size", options.global_batch_size),
        ("model.kto.reference.mode", options.reference),
        ("model.peft.peft_scheme", "lora" if options.lora or options.quantize else None),
        ("model.peft.quantize_base", options.quantize),
    ):
        if value is not None:
            given[key] = str(value)
    for override in options.overrides:
        key, is_one, value = override.partition("=")
        if not is_one:
            raise ConfigError(f"{override!r} is no KEY=VALUE.")
        given[key.lstrip("+")] = value
    return given


def _written(given: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in given.items()]


def _planner(options: argparse.Namespace, model: PretrainedConfig, given: dict[str, str]) -> Planner:
    config = load_config(_written(given))
    gpus, nodes = options.gpus, options.nodes
    if gpus is None and RECIPE in given:
        nodes = int(config.trainer.num_nodes)
        gpus = nodes * int(config.trainer.devices)
    elif gpus is None:
        raise ConfigError("--gpus is missing: say how many there are, or take a recipe.")
    nodes = nodes or -(-gpus // _NODE)
    if gpus % nodes:
        raise ConfigError(f"--gpus {gpus} cannot be divided by --nodes {nodes}: nodes have equally many.")
    length = options.mean_length or config.model.data.seq_length
    if length > config.model.data.seq_length:
        raise ConfigError(
            f"--mean-length {length} is above the longest document, model.data.seq_length="
            f"{config.model.data.seq_length}."
        )
    return Planner(config, model, gpus=gpus, node_size=gpus // nodes, device=_device(options), length=length)


def _device(options: argparse.Namespace) -> Device:
    device = DEVICES[options.gpu]
    return device if options.gpu_memory is None else replace(device, memory_gib=options.gpu_memory)


def _model(path: Path) -> PretrainedConfig:
    """Return the configuration of a model's folder, or of a file like its config.json."""
    if not path.is_file():
        return load_hf_config(path)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        try:
            return load_hf_config(folder)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(str(error).replace(str(Path(folder) / "config.json"), str(path))) from error


def _keys_of(layout: str) -> Keys:
    """Return the keys of `model` that a layout is written as in short: `tp=8,pp=8,recompute=full`."""
    keys: dict[str, object] = {}
    for part in layout.split(","):
        name, _, value = part.strip().partition("=")
        if name == "recompute" and value in RECOMPUTE:
            keys |= RECOMPUTE[value]
        elif name in SHORT and value.isdecimal() and int(value) > 0:
            keys[SHORT[name]] = int(value)
        else:
            raise ConfigError(
                f"--layout {layout}: {part!r} cannot be read. Write {', '.join(f'{name}=N' for name in SHORT)} or "
                f"recompute={'|'.join(RECOMPUTE)}, with commas between them."
            )
    if SHORT["tp"] in keys:
        keys["sequence_parallel"] = keys[SHORT["tp"]] != 1
    return keys


def _fixed(given: dict[str, str]) -> Keys:
    """Return the keys of a layout that are given, which a search leaves as they are."""
    config = load_config(_written(given))
    names = [key.removeprefix("model.") for key in given if key.startswith("model.")]
    return {name: getattr(config.model, name) for name in names if name in Planner.SEARCHED}


def _best(planner: Planner, found: Found) -> list[Plan]:
    """Return the best layouts that fit; the first one does by a dry run, where that can be done."""
    fitting = list(found.fitting)
    while fitting:
        first = _traced(planner, fitting[0])
        if planner.fits(first):
            return [first, *fitting[1:_SHOWN]]
        found.too_large.insert(0, first)
        del fitting[0]
    return []


def _traced(planner: Planner, plan: Plan) -> Plan:
    """Return a plan with its memory found by a dry run of the step; as it is, where experts make that impossible."""
    if planner.sizes.mixture is not None:
        return plan
    memory = step_memory(plan.config, planner.hf_config, plan.layout, plan.rank)
    return replace(
        plan,
        traced=True,
        memory=replace(
            plan.memory,
            weights=memory.parameters,
            gradients=memory.gradients,
            optimizer=memory.optimizer,
            reference=memory.reference,
            activations=memory.peak - memory.held,
        ),
    )


def _pasted(planner: Planner, plan: Plan, given: dict[str, str]) -> list[str]:
    """Return the overrides of a plan, which a run takes as they are; the trainer's own code has read them."""
    layout = {
        f"model.{key}": "null" if value is None else str(value).lower()
        for key, value in plan.keys.items()
        if value != getattr(planner.config.model, key)
    }
    devices = {"trainer.devices": planner.node_size, "trainer.num_nodes": planner.gpus // planner.node_size}
    overrides = _written({**given, **devices, **layout})
    load_config(overrides)
    return overrides

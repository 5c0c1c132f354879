"""What `nemo-kto plan` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from nemo_kto.network.vision import can_see
from nemo_kto.planning.memory import RankMemory
from nemo_kto.planning.search import RESERVE, RESERVE_SHARE, Found, Plan, Planner
from nemo_kto.planning.speed import HOST_BANDWIDTH, OF_LINKS, OF_PEAK, StepTime
from nemo_kto.runs.model import params_dtype_of, vision_to_plan
from nemo_kto.runtime.space import checkpoint_bytes

Pasted = Sequence[tuple[Plan, list[str]]]
"""Plans, and the overrides that each is written as."""

_GIB = 2**30
_MOST_REASONS = 4

_MEMORY = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "optimizer's state",
    "reference": "reference, resident",
    "activations": "a step's peak besides",
}
_TIME = {
    "training": "training pass",
    "scoring": "passes of KL set and reference",
    "plain": "weights in fewer bits made plain",
    "tensor": "tensor-parallel exchange",
    "context": "context-parallel exchange",
    "experts": "exchange of experts' tokens",
    "pipeline": "from stage to stage",
    "bubble": "pipeline bubble",
    "gradients": "sum of gradients",
    "parameters": "gathering of parameters",
    "reference": "weights to the host and back",
    "optimizer": "optimizer",
}


def as_text(planner: Planner, plans: Pasted, found: Found) -> str:
    """Return the page for people.

    Args:
        planner: What was planned.
        plans: The best layouts, the first one best.
        found: What became of the others.
    """
    lines = [*_job(planner), ""]
    if plans:
        lines += [*_table(planner, plans), ""]
        lines += [*_details(planner, *plans[0]), ""]
    else:
        lines += ["No layout fits.", ""]
    lines += [*_others(planner, plans, found), *_assumptions(planner)]
    return "\n".join(lines)


def _job(planner: Planner) -> Iterator[str]:
    config, parts = planner.config, planner.parts.whole
    trained = f", of which {_count(parts.trained.all)} are trained" if parts.frozen.all else ""
    kind, layers = planner.hf_config.model_type, planner.sizes.layers
    yield f"{kind}: {_count(parts.all.all)} parameters in {layers} layers{trained}"
    nodes = planner.gpus // planner.node_size
    yield (
        f"{planner.gpus} GPUs ({planner.device.name}, {planner.device.memory_gib:g} GiB), {planner.node_size} in each "
        f"of {nodes} node{'s' if nodes > 1 else ''}; {config.trainer.precision}, reference {planner.reference.mode}"
    )
    yield (
        f"global batch of {config.model.global_batch_size} documents, {planner.length:,} tokens on average, "
        f"{config.model.data.seq_length:,} at the most"
    )


def _table(planner: Planner, plans: Pasted) -> Iterator[str]:
    yield f"    {'layout':58} {'memory':>10}  {'step':>10}  {'tokens/s/GPU':>12}  {'MFU':>5}"
    for number, (plan, _) in enumerate(plans, start=1):
        how = "" if plan.traced else " ~"
        yield (
            f"{number:2}  {_short(plan):58} {_size(plan.memory.peak):>10}{how:2}"
            f"{_seconds(plan.time.total):>10}  {plan.tokens_per_second:12,.0f}  {plan.utilisation:5.0%}"
        )
    if any(not plan.traced for plan, _ in plans):
        yield "    ~ by formula; without it, by a dry run of the step"
    yield ""
    for number, (_, overrides) in enumerate(plans, start=1):
        yield f"{number:2}  {shlex.join(overrides)}"


def _short(plan: Plan) -> str:
    """Return a layout in few letters."""
    layout, model = plan.layout, plan.config.model
    words = [f"TP{layout.tensor}{'+SP' if layout.sequence else ''}", f"PP{layout.pipeline}"]
    words += [f"VPP{layout.virtual}"] * (layout.virtual > 1) + [f"CP{layout.context}"] * (layout.context > 1)
    if model.num_layers_in_first_pipeline_stage is not None or model.num_layers_in_last_pipeline_stage is not None:
        words.append("uneven")
    words += [f"EP{layout.expert}"] * (layout.expert > 1) + [f"DP{layout.data}"]
    tokens = model.micro_batch_tokens
    words.append(f"micro-batch {model.micro_batch_size}" if tokens is None else f"micro-batch of {tokens:,} tokens")
    words += [f"recompute {model.activations_checkpoint_granularity}"] * bool(model.activations_checkpoint_granularity)
    return " ".join(words)


def _details(planner: Planner, plan: Plan, _: list[str]) -> Iterator[str]:
    memory = plan.memory
    how = "by a dry run of the step" if plan.traced else "by formula"
    yield f"The first, on a GPU of pipeline stage {plan.stage}, where most is ({how}):"
    yield from (f"    {_size(value):>10}  {name}" for name, value in _parts(memory, _MEMORY) if value)
    for value, purpose in ((memory.host, "the reference"), (memory.host_optimizer, "the optimizer's state")):
        if value:
            yield f"    besides {_size(value * planner.node_size)} of each host's memory for {purpose}"
    over = "" if planner.fits(plan) else f". It does not fit: {_size(memory.peak)} are needed"
    yield f"    of {_size(planner.room)} that may be used{over}"
    yield "A step:"
    yield from (f"    {_seconds(value):>10}  {name}" for name, value in _parts(plan.time, _TIME) if value)
    yield "A GPU sends in a step:"
    for each in plan.speed.traffic():
        if each.bytes:
            link = "within its node" if each.within_node else "to other nodes"
            yield f"    {_size(each.bytes):>10}  {_TIME[each.kind]}, {link}"
    trained = planner.parts.whole.trained.all
    yield f"A checkpoint takes {_size(checkpoint_bytes(trained, params_dtype_of(planner.config)))} of disk."


def _parts(record: RankMemory | StepTime, names: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """Yield (how it is called, value) of the parts that have a name."""
    for each in fields(record):
        if each.name in names:
            yield names[each.name], getattr(record, each.name)


def _others(planner: Planner, plans: Pasted, found: Found) -> Iterator[str]:
    slowest = max((plan.time.total for plan, _ in plans), default=float("inf"))
    for plan in [each for each in found.too_large if each.time.total < slowest][:_MOST_REASONS]:
        yield (
            f"Too large: {_short(plan)}, {_size(plan.memory.peak)} of {_size(planner.room)}, would take "
            f"{_seconds(plan.time.total)}."
        )
    reasons = sorted(found.refused, key=lambda reason: -found.refused[reason])
    for reason in reasons[:_MOST_REASONS]:
        yield f"Refused: {reason}"
    if len(reasons) > _MOST_REASONS:
        yield f"Refused for {len(reasons) - _MOST_REASONS} more reasons of this kind."
    if found.too_large or reasons:
        yield ""


def _assumptions(planner: Planner) -> Iterator[str]:
    device = planner.device
    yield "Assumed, and not measured:"
    yield (
        f"    {OF_PEAK:.0%} of {device.flops / 1e12:,.0f} TFLOP/s; {OF_LINKS:.0%} of "
        f"{device.nvlink_bandwidth / 2e9:,.0f} GB/s within a node and "
        f"{device.network_bandwidth / 1e9:,.0f} GB/s between nodes, one way; "
        f"{HOST_BANDWIDTH / 1e9:,.0f} GB/s to the host and in its memory; nothing overlaps"
    )
    yield (
        f"    {RESERVE / _GIB:.0f} GiB and {RESERVE_SHARE:.0%} of a GPU left free, for CUDA, NCCL and what lies "
        "between blocks of memory"
    )
    if planner.sizes.mixture is not None:
        yield "    experts get equally many tokens"
    if can_see(planner.hf_config):
        known = vision_to_plan(planner.config, planner.hf_config) is not None
        yield (
            "    documents are of text: what sees images, on the first stage, "
            + ("counts with its parameters, and nothing that it makes of images" if known else "is not counted")
        )


def as_json(planner: Planner, plans: Pasted) -> list[dict[str, Any]]:
    """Return the plans as plain values.

    Args:
        planner: What was planned.
        plans: The best layouts.
    """
    return [
        {
            "overrides": overrides,
            "fits": planner.fits(plan),
            "memory": asdict(plan.memory)
            | {"held": plan.memory.held, "peak": plan.memory.peak, "traced": plan.traced},
            "room": planner.room,
            "seconds": asdict(plan.time) | {"total": plan.time.total},
            "traffic": [asdict(each) for each in plan.speed.traffic()],
            "tokens_per_second_per_gpu": plan.tokens_per_second,
            "model_flops_utilisation": plan.utilisation,
            "parameters": planner.parts.whole.all.all,
            "trained_parameters": planner.parts.whole.trained.all,
        }
        for plan, overrides in plans
    ]


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(number: float) -> str:
    """Return bytes in GiB, or less where there are few."""
    units = ("KiB", "MiB", "GiB")
    power = next((power for power in (3, 2) if number >= 0.1 * 1024**power), 1)
    return f"{number / 1024**power:,.1f} {units[power - 1]}"


def _seconds(value: float) -> str:
    if value >= 10:
        return f"{value:.1f} s"
    factor, unit = next((each for each in ((1, "s"), (1e3, "ms")) if value * each[0] >= 0.1), (1e6, "us"))
    return f"{value * factor:.2f} {unit}"

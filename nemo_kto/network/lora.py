"""LoRA (arXiv 2106.09685) beside Megatron's column- and row-parallel projections, as PEFT defines it.

Megatron computes query, key and value as one projection, gate and up as another. Adapters are those that PEFT gives
the Hugging Face model all the same: where it has one projection for each of these parts, each has an A and a B of its
own (a shared A could not hold three different ones); where its projections are fused too, their parts have one A
together. So every PEFT adapter can be continued exactly, and one trained here is one PEFT could have trained.

An adapted projection computes `W x + scale * B A dropout(x)` (eq. 3 of the paper), W frozen; `adapters.py` has how,
and what DoRA makes of it.

Tensor legend: `T` tokens of a packed row on this rank, `i` input channels of a projection.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_kto.network.adapters import Adapted, adapt
from nemo_kto.network.attention import DocumentParams
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import KTOGPTModel, tensor_generator
from nemo_kto.network.low_rank import Switch
from nemo_kto.network.projections import (
    LoRASettings,
    adapted_modules,
    linear_layers,
    linear_of,
    place_in_layer,
)
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.sharded import sharded_leaves
from nemo_kto.network.trained_copies import PLACES, Copied, add_copy


@dataclass(kw_only=True)
class RowParams(DocumentParams):
    """The description of a packed row, and what the adapters' dropout depends on.

    Attributes:
        dropout_keys: `[T]` int32, a number for each token of this context-parallel rank, the same under every layout;
            None where nothing is dropped.
    """

    dropout_keys: torch.Tensor | None = None


def add_adapters(model: KTOGPTModel, settings: LoRASettings) -> None:
    """Freeze `model` and give the chosen projections adapters, whose values are still to be set.

    Set them with `initialize_adapters`, `import_adapter` or a checkpoint. Layers are Megatron's own
    (`build_gpt(..., unfused=True)`).

    Args:
        model: A chunk on any rank, not wrapped.
        settings: Which adapters; layers of other chunks and ranks are passed over.
    """
    model.requires_grad_(False)
    switch, sizes = Switch(), dimensions_of(model.hf_config)
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        if number not in settings.layers:
            continue
        adapted = adapted_modules(settings, model.hf_config, [number])
        for name, parts in linear_layers(model.hf_config).items():
            modules, place = {}, ""
            for (_, projection), module in adapted.items():
                if linear_of(projection, sizes) == name:
                    place, adapter = place_in_layer(projection, number, sizes)
                    modules[adapter] = module
            if modules:
                linear = layer.get_submodule(place)
                adapt(linear, parts, modules=modules, settings=settings, switch=switch)
                linear._dropout_salt = zlib.crc32(f"{number}.{place}".encode())
        layer.register_forward_pre_hook(_note_dropout_keys(switch), with_kwargs=True)
    for name in settings.whole:
        if getattr(model, "pre_process" if name == "embed_tokens" else "post_process"):
            add_copy(model.get_submodule(PLACES[name]), name, switch)
    model.adapter_switch = switch
    if model.config.recompute_granularity == "full" and model.pre_process:
        # recomputed layers take part in the backward pass only if an input of theirs has a gradient
        model.embedding.register_forward_hook(lambda module, inputs, output: _with_gradient(output))


def _with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.requires_grad_() if torch.is_grad_enabled() else tensor


def _note_dropout_keys(switch: Switch) -> Any:
    """Return a hook of a transformer layer: it runs before the layer, also when the layer is recomputed."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        switch.dropout_keys = getattr(kwargs["packed_seq_params"], "dropout_keys", None)

    return hook


@torch.no_grad()
def initialize_adapters(model: KTOGPTModel, *, seed: int) -> None:
    """Fill A with random numbers that depend on `seed` only, never on the layout, and B with zeros.

    A is uniform between +-1/sqrt(i), as in PEFT. Each full tensor is drawn from a generator of its own. Magnitudes and
    copies are those of the weights, which have to be there; collectives: see `clear_adapters`.
    """
    clear_adapters(model)
    for leaf in sharded_leaves(model, adapters=True):
        if not leaf.key.endswith(".lora_a"):
            continue
        full = torch.rand(leaf.global_shape, generator=tensor_generator(seed, leaf.key), device="cpu")
        bound = 1 / math.sqrt(leaf.global_shape[1])
        leaf.data.copy_((2 * full - 1).mul_(bound)[leaf.region])


@torch.no_grad()
def clear_adapters(model: KTOGPTModel) -> None:
    """Set all adapters to zero, magnitudes and copies to what the weights have: the model is then the base model.

    With DoRA, each row-parallel layer has an all-reduce over the tensor-parallel ranks.
    """
    for leaf in sharded_leaves(model, adapters=True):
        leaf.data.zero_()
    for layer in _adapted_layers([model]):
        layer.start_from_base()


def _adapted_layers(models: Iterable[KTOGPTModel]) -> list[Adapted | Copied]:
    return [module for model in models for module in model.modules() if isinstance(module, Adapted | Copied)]


@contextmanager
def adapters_off(models: Iterable[KTOGPTModel]) -> Iterator[None]:
    """Make models compute what their base models compute, to the last bit, inside a `with` block."""
    switches = [model.adapter_switch for model in models]
    for switch in switches:
        switch.on = False
    try:
        yield
    finally:
        for switch in switches:
            switch.on = True


@contextmanager
def adapters_merged(models: Iterable[KTOGPTModel]) -> Iterator[None]:
    """Add the adapters to the weights beside them inside a `with` block; restore those exactly at its end.

    The sums are made in float32 and rounded once to the weights' dtype. Memory: a copy of the adapted weights of this
    rank in CPU memory; of those in fewer bits, the sums.
    """
    models = list(models)
    layers: list[Any] = _adapted_layers(models)
    originals = [_put_aside(layer.weight) for layer in layers]
    try:
        with adapters_off(models), torch.no_grad():
            for layer in layers:
                merged = _merged_weight(layer)
                if isinstance(layer.weight, QuantisedWeight):
                    layer.weight = torch.nn.Parameter(merged.to("cpu", layer.weight.dtype), requires_grad=False)
                else:
                    layer.weight.copy_(merged)
            yield
    finally:
        with torch.no_grad():
            for layer, original in zip(layers, originals, strict=True):
                if isinstance(original, QuantisedWeight):
                    layer.weight = original
                else:
                    layer.weight.copy_(original)


def _merged_weight(layer: Any) -> torch.Tensor:
    """Return a layer's merged weight, made where its adapters are: the weight may lie in the host's memory."""
    weight, device = layer.weight, next(layer.adapters.parameters()).device
    if weight.device != device:
        layer.weight = torch.nn.Parameter(weight.to(device), requires_grad=False)
    try:
        merged: torch.Tensor = layer.merged_weight()
    finally:
        layer.weight = weight
    return merged


def _put_aside(weight: torch.Tensor) -> torch.Tensor:
    return weight if isinstance(weight, QuantisedWeight) else weight.detach().to("cpu", copy=True)

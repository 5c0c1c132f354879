"""What PEFT calls an adapter's tensors, which shapes they have, and what they are in the sharded state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from nemo_kto.errors import CheckpointError, git_lfs_hint
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import whole_of
from nemo_kto.network.projections import LINEAR_OF, LoRASettings, adapted_modules, parts_of, place_in_layer
from nemo_kto.network.trained_copies import key_of_copy
from nemo_kto.network.weight_rules import Piece, stacked

WEIGHTS_FILE = "adapter_model.safetensors"
MAGNITUDES = "lora_magnitude_vector"
"""What the names of the tensors of DoRA's magnitudes end with."""


def linear_sizes(hf: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return part of a linear layer, as adapters beside it are named -> (its outputs, its inputs)."""
    model = dimensions_of(hf)
    hidden = model.hidden
    queries, keys = model.heads * model.head_channels, model.groups * model.head_channels
    sizes = {
        "q_proj": (2 * queries if model.output_gates else queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    if model.latent is not None:
        latent, heads = model.latent, model.heads
        sizes["q_proj"] = (heads * latent.scored, hidden)
        sizes["o_proj"] = (hidden, heads * latent.values)
        sizes["kv_a_proj_with_mqa"] = (latent.keys_and_values + latent.rotated, hidden)
        sizes["kv_b_proj"] = (heads * (latent.plain + latent.values), latent.keys_and_values)
        if latent.queries is not None:
            sizes["q_a_proj"], sizes["q_b_proj"] = (latent.queries, hidden), (heads * latent.scored, latent.queries)
    shared = None if model.mixture is None else model.mixture.shared
    for prefix, inner in (("", model.feed_forward), *([(f"{shared.name}-", shared.feed_forward)] if shared else [])):
        sizes |= {f"{prefix}{name}": (inner, hidden) for name in ("gate_proj", "up_proj", "c_fc")}
        sizes |= {f"{prefix}{name}": (hidden, inner) for name in ("down_proj", "c_proj")}
    return sizes


def expected_shapes(settings: LoRASettings, hf: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the adapters, by PEFT's name."""
    sizes, model, prefix = linear_sizes(hf), dimensions_of(hf), prefix_of(hf)
    shapes: dict[str, tuple[int, ...]] = {}
    for (layer, projection), module in adapted_modules(settings, hf).items():
        linear, name = place_in_layer(projection, layer, model)
        for matrix in ("lora_a", "lora_b", "lora_m")[: 3 if settings.dora else 2]:
            key = f"decoder.layers.{layer}.{linear}.adapters.{name}.{matrix}"
            piece = piece_of(key, sizes, rank=settings.rank_of(module), prefix=prefix)
            shapes[piece.name] = piece.tensor_shape
    names = whole_tensors(hf)
    return shapes | {names[key_of_copy(name)]: (model.vocabulary, model.hidden) for name in settings.whole}


def whole_tensors(hf: PretrainedConfig) -> dict[str, str]:
    """Return the name in the sharded state dict of each module that can be trained whole -> PEFT's."""
    places = {"embed_tokens": prefix_of(hf).removesuffix("layers."), "lm_head": "base_model.model."}
    return {key_of_copy(name): f"{place}{name}.weight" for name, place in places.items()}


def prefix_of(hf: PretrainedConfig) -> str:
    """Return what PEFT's names of all tensors begin with."""
    return f"base_model.model.model.{'' if whole_of(hf) is None else 'language_model.'}layers."


_TENSOR = re.compile(
    r"base_model\.model\.model\.(?:language_model\.)?layers\.(\d+)\.(?:self_attn|mlp|mlp\.shared_experts?)\.(\w+)"
    rf"\.(?:lora_[AB]\.weight|{MAGNITUDES})"
)
_KEY = re.compile(r"decoder\.layers\.(\d+)\.(\w+)\.[\w.]+\.adapters\.([\w-]+)\.lora_([abm])(?:_(\w+))?")
_WHOLE_TENSOR = re.compile(r"base_model\.model\.(?:model\.(?:language_model\.)?(embed_tokens)|(lm_head))\.weight")
_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": MAGNITUDES}
_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}


def _named(key: str, prefix: str) -> tuple[str, str, str]:
    """Return (PEFT's name, adapters' name, part or "") of the matrix named `key` in the sharded state dict."""
    match = _KEY.fullmatch(key)
    assert match is not None, key
    layer, block, adapters, kind, part = match.groups()
    place = f"{_BLOCKS[block]}.{adapters.replace('-', '.')}"
    return f"{prefix}{layer}.{place}.{_NAMES[kind]}", adapters, part or ""


def piece_of(key: str, sizes: Mapping[str, tuple[int, int]], *, rank: int, prefix: str) -> Piece:
    """Return where the matrix named `key` in the sharded state dict is in PEFT's tensors; see `prefix_of`."""
    name, adapters, part = _named(key, prefix)
    parts, block = parts_of(adapters), adapters[: adapters.rfind("-") + 1]
    if name.endswith("lora_A.weight"):
        return Piece(name, (rank, sizes[block + parts[0]][1]))
    inner = () if name.endswith(MAGNITUDES) else (rank,)
    pieces = stacked(name, *((sizes[block + part][0], *inner) for part in parts))
    return pieces[parts.index(part) if part else 0]


def joined(tensors: Mapping[str, torch.Tensor], hf: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors by name, from the matrices by their names in the sharded state dict."""
    prefix, names, vocabulary = prefix_of(hf), whole_tensors(hf), dimensions_of(hf).vocabulary
    whole = {names[key]: tensor[:vocabulary].contiguous() for key, tensor in tensors.items() if key in names}
    found: dict[str, dict[str, torch.Tensor]] = {}
    orders: dict[str, tuple[str, ...]] = {}
    for key, tensor in tensors.items():
        if key in names:
            continue
        name, projection, part = _named(key, prefix)
        found.setdefault(name, {})[part] = tensor
        orders[name] = parts_of(projection) if part else ("",)
    return whole | {name: torch.cat([matrices[part] for part in orders[name]]) for name, matrices in found.items()}


def whole_module_of(name: str) -> str | None:
    """Return the module of `WHOLE` whose weight PEFT's tensor `name` is; None for another tensor."""
    match = _WHOLE_TENSOR.fullmatch(name)
    return next(filter(None, match.groups())) if match else None


def place_of(name: str) -> tuple[int, str] | None:
    """Return (layer, projection) of PEFT's tensor `name`; None if it is of no projection known here."""
    match = _TENSOR.fullmatch(name)
    return (int(match[1]), match[2]) if match and match[2] in LINEAR_OF else None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an adapter folder, from the file's header."""
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as source:
            return {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        hint = git_lfs_hint(file) or " Save the adapter with PEFT as safetensors."
        raise CheckpointError(f"{file} cannot be read: {error}.{hint}") from error

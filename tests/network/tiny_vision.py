"""Tiny random models that see images, rows with images made by hand, and transformers' whole model for comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from nemo_kto.data.batches.packed_rows import PackedRow, pack_documents
from nemo_kto.data.batches.row_images import Picture, RowImages
from nemo_kto.kto.scoring import RowScorer, RowScores
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.hf_config import load_hf_config, whole_config
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.vision import VisionSettings
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_hf

IMAGE = 3
"""The token that stands for images."""

NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 2}
EYES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
GEMMA: dict[str, Any] = {**NO_TOKENS, "head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 6}
QWEN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_EYES: dict[str, Any] = {
    **{"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
    # windows of two tokens: larger images have several
    **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2},
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}


def configs() -> dict[str, PretrainedConfig]:
    """Return a configuration for each kind of model that can be trained on images."""
    clip = CLIPVisionConfig(**EYES, projection_dim=8)
    llava: dict[str, Any] = {"image_token_index": IMAGE, "image_seq_length": 4}
    return {
        "llava_clip": LlavaConfig(text_config=LlamaConfig(**tiny_hf.SIZES), vision_config=clip, **llava),
        "llava_mistral": LlavaConfig(
            text_config=MistralConfig(**tiny_hf.SIZES, sliding_window=7),
            vision_config=clip,
            vision_feature_layer=[-3, -2],
            **llava,
        ),
        "llava_siglip": LlavaConfig(
            text_config=Qwen2Config(**tiny_hf.SIZES, tie_word_embeddings=True),
            vision_config=SiglipVisionConfig(**EYES, vision_use_head=False),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=True,
            **llava,
        ),
        "qwen2_5_vl": Qwen2_5_VLConfig(
            text_config={**tiny_hf.SIZES, **NO_TOKENS, "rope_parameters": QWEN_ROPE},
            vision_config=QWEN_EYES,
            **QWEN_TOKENS,
        ),
        "gemma3": Gemma3Config(
            text_config=Gemma3TextConfig(
                **tiny_hf.SIZES, **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2
            ),
            vision_config=SiglipVisionConfig(**{**EYES, "image_size": 48}),
            mm_tokens_per_image=9,
            image_token_index=IMAGE,
            tie_word_embeddings=True,
        ),
    }


def make_folder(folder: Path, config: PretrainedConfig) -> Path:
    """Save a model with random weights, biases and norms included."""
    config.dtype = torch.float32
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            centre = parameter.mean() if is_norm else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + centre)
    model.save_pretrained(folder)
    return folder


def make_folders(root: Path, names: Iterable[str] = ()) -> Path:
    """Save the models of these names, or all, in folders called so."""
    for name, config in configs().items():
        if not names or name in names:
            make_folder(root / name, config)
    return root


def load(folder: Path) -> Any:
    """Return transformers' whole model, with its plain attention."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass(frozen=True)
class Shown:
    """A document with images, as transformers takes it."""

    prompt: torch.Tensor
    response: torch.Tensor
    pictures: tuple[Picture, ...]

    @property
    def starts(self) -> list[int]:
        """Where the tokens of each picture begin."""
        places = (self.prompt == IMAGE).nonzero()[:, 0]
        sizes = [picture.num_tokens for picture in self.pictures]
        return [int(places[first]) for first in itertools.accumulate([0, *sizes[:-1]])] if sizes else []


def picture(config: PretrainedConfig, key: int, grid: tuple[int, int] = (2, 3)) -> Picture:
    """Return an image of random pixels; `grid` is its rows and columns of tokens, where the model counts them."""
    generator = torch.Generator().manual_seed(key)
    if config.model_type == "qwen2_5_vl":
        rows, columns = (2 * side for side in grid)  # of patches, of which four make a token
        pixels = torch.randn(rows * columns, 3 * 2 * 4 * 4, generator=generator)
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}
        return Picture(key, grid[0] * grid[1], grid, inputs)
    size = config.vision_config.image_size
    tokens = config.mm_tokens_per_image if config.model_type == "gemma3" else (size // 8) ** 2
    return Picture(key, tokens, None, {"pixel_values": torch.randn(1, 3, size, size, generator=generator)})


def documents(config: PretrainedConfig) -> list[list[Shown]]:
    """Return two rows: documents with none, one and two images, one of them shown twice, and one of text alone."""
    first, second = picture(config, 11), picture(config, 12, (4, 2))
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> torch.Tensor:
        return torch.randint(10, tiny_hf.VOCAB_SIZE, (length,), generator=generator)

    def tokens(shown: Picture) -> torch.Tensor:
        return torch.full((shown.num_tokens,), IMAGE)

    return [
        [
            Shown(text(9), text(4), ()),
            Shown(torch.cat([text(3), tokens(first), text(4)]), text(5), (first,)),
            Shown(torch.cat([text(1), tokens(second), text(2), tokens(first), text(7)]), text(3), (second, first)),
        ],
        [Shown(text(12), text(6), ())],
    ]


def row_of(shown: Sequence[Shown], *, counts_grid: bool) -> PackedRow:
    """Return documents as a packed row."""
    row = pack_documents([(each.prompt, each.response) for each in shown])
    pictures = tuple(itertools.chain.from_iterable(each.pictures for each in shown))
    images = None
    if pictures:
        prompts = [torch.cat([each.prompt, torch.zeros_like(each.response)]) for each in shown]
        places = (torch.cat(prompts) == IMAGE).nonzero()[:, 0]
        firsts = row.cu_seqlens.tolist()
        starts = [first + start for first, each in zip(firsts, shown, strict=False) for start in each.starts]
        images = RowImages(pictures, places, torch.arange(len(places)), tuple(starts))
    rotary = torch.cat([positions_of(each) for each in shown], dim=1) if counts_grid and pictures else None
    return replace(row, images=images, rotary_positions=rotary)


def positions_of(shown: Shown) -> torch.Tensor:
    """Return the positions `[3, tokens]` in time, rows and columns: text counts on from the last row or column."""
    places = dict(zip(shown.starts, shown.pictures, strict=True))
    found: list[torch.Tensor] = []
    token, position = 0, 0
    while token < len(shown.prompt) + len(shown.response):
        grid = places[token].grid if token in places else None
        if grid is None:
            found.append(torch.full((3, 1), position))
            token, position = token + 1, position + 1
            continue
        rows, columns = (side.flatten() for side in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        found.append(position + torch.stack([torch.zeros_like(rows), rows, columns]))
        token, position = token + len(rows), position + max(grid)
    return torch.cat(found, dim=1)


def whole_logps(model: Any, shown: Shown) -> torch.Tensor:
    """Return transformers' log-prob of a response, with its own positions, masks and features."""
    tokens = torch.cat([shown.prompt, shown.response])[None]
    kinds = torch.cat([(shown.prompt == IMAGE), torch.zeros_like(shown.response, dtype=torch.bool)])[None].int()
    names = list(shown.pictures[0].inputs) if shown.pictures else []
    inputs = {name: torch.cat([each.inputs[name] for each in shown.pictures]) for name in names}
    of_model = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
    if shown.pictures and model.config.model_type in of_model:
        inputs[of_model[model.config.model_type]] = kinds
    logits = model(input_ids=tokens, **inputs).logits[0, len(shown.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, shown.response[:, None]).sum()


# ours

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP2_SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2_VPP2": {"pipeline": 2, "virtual": 2},
    "CP2": {"context": 2},
    "DP2": {},
}
WEIGHTS = (1.0, -0.6, 0.4, 0.7)
"""What the log-probs of the four documents are multiplied with for the loss."""


def world_of(layout: str) -> int:
    """Return how many ranks a layout has."""
    return 1 if layout == "TP1" else 2


def chunks_of(
    folder: Path, layout: Layout, *, train: str = "none", recompute: bool = False, unfused: bool = False
) -> list[KTOGPTModel]:
    """Build this rank's chunks and read their weights."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(layout, seed=1)
    whole = whole_config(folder)
    assert whole is not None
    again = Recompute(granularity="full", method="uniform", num_layers=1) if recompute else None
    chunks = []
    for number in range(layout.virtual):
        vision = VisionSettings(config=whole, train=train)
        model = build_gpt(
            load_hf_config(folder), layout, chunk=number, vision=vision, recompute=again, unfused=unfused
        )
        import_hf(model, folder)
        chunks.append(model)
    return chunks


def rows_of(folder: Path) -> list[Any]:
    """Return the packed rows, two; of them this rank's share."""
    config, place = whole_config(folder), parallel.position()
    assert config is not None
    rows = [row_of(shown, counts_grid=config.model_type == "qwen2_5_vl") for shown in documents(config)]
    return rows[place.dp_rank :: place.dp_size]


def logps_of(folder: Path, chunks: list[KTOGPTModel], layout: Layout) -> torch.Tensor | None:
    """Return the log-probs of this rank's documents; None except on the last stage."""
    return RowScorer(chunks=chunks, place=parallel.position(), layout=layout).score(rows_of(folder))


def loss_of(scores: RowScores, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs of a row's documents times their `WEIGHTS`, summed; for `RowScorer.train`."""
    place = parallel.position()
    weights = torch.tensor(WEIGHTS).split([3, 1])[place.dp_rank :: place.dp_size]
    return (scores.logps * weights[index]).sum(), scores.logps.detach()

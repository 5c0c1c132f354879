"""Models that see images: log-probs and gradients equal those of transformers' whole model under every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.utils import get_model_config

from nemo_kto.data.batches.row_images import Picture
from nemo_kto.errors import ConfigError
from nemo_kto.kto.scoring import RowScorer, unwrapped
from nemo_kto.network.hf_config import whole_config
from nemo_kto.network.vision import Vision
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout
from tests.network import tiny_vision

MODELS = tuple(tiny_vision.configs())
# what the ranks do


def score(source: Path, layout: str) -> dict[str, torch.Tensor | None]:
    """Return the log-probs of this rank's documents with each model."""
    found = {}
    for name in MODELS:
        division = Layout(world_size=dist.get_world_size(), **tiny_vision.LAYOUTS[layout])
        found[name] = tiny_vision.logps_of(source / name, tiny_vision.chunks_of(source / name, division), division)
    return found


def differentiate(
    source: Path, layout: str, train: str, overlap: bool, recompute: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the gradients of what is trained of each model's vision, under transformers' names."""
    found = {}
    for name in MODELS:
        division = Layout(world_size=dist.get_world_size(), **tiny_vision.LAYOUTS[layout])
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
        chunks = [
            DistributedDataParallel(get_model_config(chunk), config, chunk)
            for chunk in tiny_vision.chunks_of(source / name, division, train=train, recompute=recompute)
        ]
        of_model = get_model_config(chunks[0])
        of_model.finalize_model_grads_func = finalize_model_grads
        of_model.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
        for _ in range(2):  # in the second pass Megatron knows how many gradients are to come
            for chunk in chunks:
                chunk.zero_grad_buffer()
            scorer = RowScorer(chunks=chunks, place=parallel.position(), layout=division)
            scorer.train(tiny_vision.rows_of(source / name), tiny_vision.loss_of)
        vision = unwrapped(chunks[0]).vision
        found[name] = {} if vision is None else gradients_of(vision)
    return found


def gradients_of(vision: Vision) -> dict[str, torch.Tensor]:
    return {
        vision.source_name(name): parameter.main_grad.clone()  # type: ignore[attr-defined]
        for name, parameter in vision.named_parameters()
        if parameter.requires_grad
    }


# what transformers says


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each model."""
    return tiny_vision.make_folders(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor | None]]]:
    """Return, for each model, the log-probs of the documents, and the gradients of what is not the language model."""
    found = {}
    for name in MODELS:
        model = tiny_vision.load(source / name)
        shown = [each for row in tiny_vision.documents(model.config) for each in row]
        logps = torch.stack([tiny_vision.whole_logps(model, each) for each in shown])
        (logps * torch.tensor(tiny_vision.WEIGHTS)).sum().backward()
        gradients = {
            each.removeprefix("model."): parameter.grad
            for each, parameter in model.named_parameters()
            if "language_model" not in each and "lm_head" not in each
        }
        found[name] = logps.detach(), gradients
    return found


@pytest.mark.parametrize("layout", [layout for layout in tiny_vision.LAYOUTS if layout != "DP2"])
def test_log_probs_equal_transformers(
    source: Path, expected: dict[str, Any], run_ranks: Callable[..., Any], layout: str
) -> None:
    """Of documents with none, one and two images, which differ: no feature is at another's place."""
    found = run_ranks(score, tiny_vision.world_of(layout), source, layout)
    for name in MODELS:
        scored = [each[name] for each in found if each[name] is not None]
        assert scored
        for logps in scored:
            torch.testing.assert_close(logps, expected[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", tiny_vision.LAYOUTS)
def test_gradients_equal_autograd_through_transformers(
    source: Path, expected: dict[str, Any], run_ranks: Callable[..., Any], layout: str, overlap: bool
) -> None:
    for train in ("projector", "all"):
        found = run_ranks(differentiate, tiny_vision.world_of(layout), source, layout, train, overlap)
        for name in MODELS:
            check_gradients(name, [each[name] for each in found if each[name]], expected[name][1], train)


def check_gradients(
    name: str, found: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor | None], train: str
) -> None:
    wanted = {
        each: gradient
        for each, gradient in expected.items()
        if gradient is not None and (train == "all" or "projector" in each or "merger" in each)
    }
    assert len(found) >= 1 and len(wanted) >= 2
    for gradients in found:
        # of what nothing depends on there is none: it is not trained
        assert gradients.keys() == wanted.keys(), name
        for each, gradient in wanted.items():
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(gradients[each], gradient, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("layout", ["TP2_SP", "CP2"])
def test_gradients_do_not_depend_on_recomputation(
    source: Path, expected: dict[str, Any], run_ranks: Callable[..., Any], layout: str
) -> None:
    found = run_ranks(differentiate, 2, source, layout, "all", False, True)
    for name in MODELS:
        check_gradients(name, [each[name] for each in found if each[name]], expected[name][1], "all")


# what is kept


def eyes(folder: Path, train: str = "none") -> tuple[Vision, list[Picture]]:
    """Return what sees images in a model, on one rank, and two images."""
    (model,) = tiny_vision.chunks_of(folder, Layout(world_size=1), train=train)
    assert model.vision is not None
    config = whole_config(folder)
    return model.vision, [tiny_vision.picture(config, 1), tiny_vision.picture(config, 2, (4, 2))]


def see(source: Path) -> None:
    """The same bits with and without gradients, whatever else is in the row, and in training mode."""
    for name in MODELS:
        for train in ("none", "projector", "all"):
            vision, (first, second) = eyes(source / name, train)
            vision.train()
            with torch.no_grad():
                alone = vision.features([second])
            vision.forget()
            together = vision.features([first, second, first])
            assert together.requires_grad is (train != "none")
            assert torch.equal(together[first.num_tokens : -first.num_tokens], alone)
            assert torch.equal(together[: first.num_tokens], together[-first.num_tokens :])
            assert not torch.equal(together[: first.num_tokens], alone[: first.num_tokens])


def keep(source: Path, train: str) -> list[int]:
    """Return how often the tower has run, after each of some looks at an image."""
    vision, (first, _) = eyes(source / "llava_clip", train)
    counts: list[int] = []
    ran = [0]
    look = vision.tower.get_image_features

    def counted(**inputs: Any) -> Any:
        ran[0] += 1
        return look(**inputs)

    vision.tower.get_image_features = counted
    for what in ("", "", "forget", "exchange in place", "exchange memory", ""):
        if what == "forget":
            vision.forget()
        elif what:
            frozen = next(each for each in vision.parameters() if not each.requires_grad)
            with torch.no_grad():
                if what == "exchange in place":
                    frozen.copy_(frozen * 2)
                else:
                    frozen.data = frozen * 2
        twice = vision.features([first, first])
        assert torch.equal(twice, vision.features([first]).repeat(2, 1))
        counts.append(ran[0])
    return counts


def test_features_depend_on_nothing_but_the_image(source: Path, run_ranks: Callable[..., Any]) -> None:
    run_ranks(see, 1, source)


@pytest.mark.parametrize(
    ("train", "expected_runs"),
    # each look is two: features are kept until they are forgotten, or come from other parameters
    [("none", [1, 1, 2, 3, 4, 4]), ("projector", [1, 1, 2, 3, 4, 4]), ("all", [2, 4, 6, 8, 10, 12])],
)
def test_what_a_frozen_tower_has_seen_is_kept(
    source: Path, run_ranks: Callable[..., Any], train: str, expected_runs: list[int]
) -> None:
    assert run_ranks(keep, 1, source, train) == [expected_runs]


def miscount(source: Path) -> None:
    vision, (first, _) = eyes(source / "llava_clip")
    with pytest.raises(ConfigError, match="An image has 5 tokens in its prompt, and is 4 to the model"):
        vision.features([replace(first, num_tokens=5)])


def test_another_number_of_tokens_is_an_error(source: Path, run_ranks: Callable[..., Any]) -> None:
    run_ranks(miscount, 1, source)

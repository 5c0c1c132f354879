"""Models that see images: log-probs and gradients equal those of transformers' whole model under every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.utils import get_model_config

from nemo_kto.config.schema import OptimConfig
from nemo_kto.data.batches.packed_rows import Picture
from nemo_kto.errors import ConfigError
from nemo_kto.kto.scoring import RowScorer, RowScores, unwrapped
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.hf_config import load_hf_config, whole_config
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.vision import Vision, VisionSettings
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.optimizer import make_optimizer, wrap_for_training
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_vision

MODELS = tuple(tiny_vision.configs())
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
    return 1 if layout == "TP1" else 2


def chunks_of(folder: Path, layout: Layout, *, train: str = "none", recompute: bool = False) -> list[KTOGPTModel]:
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
        model = build_gpt(load_hf_config(folder), layout, chunk=number, vision=vision, recompute=again)
        import_hf(model, folder)
        chunks.append(model)
    return chunks


def rows_of(folder: Path) -> list[Any]:
    """Return the packed rows, two; of them this rank's share."""
    config, place = whole_config(folder), parallel.position()
    assert config is not None
    rows = [
        tiny_vision.row_of(shown, counts_grid=config.model_type == "qwen2_5_vl")
        for shown in tiny_vision.documents(config)
    ]
    return rows[place.dp_rank :: place.dp_size]


def logps_of(folder: Path, chunks: list[KTOGPTModel], layout: Layout) -> torch.Tensor | None:
    """Return the log-probs of this rank's documents; None except on the last stage."""
    return RowScorer(chunks=chunks, place=parallel.position(), layout=layout).score(rows_of(folder))


# what the ranks do


def score(source: Path, layout: str) -> dict[str, torch.Tensor | None]:
    """Return the log-probs of this rank's documents with each model."""
    found = {}
    for name in MODELS:
        division = Layout(world_size=dist.get_world_size(), **LAYOUTS[layout])
        found[name] = logps_of(source / name, chunks_of(source / name, division), division)
    return found


def differentiate(
    source: Path, layout: str, train: str, overlap: bool, recompute: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the gradients of what is trained of each model's vision, under transformers' names."""
    found = {}
    for name in MODELS:
        division = Layout(world_size=dist.get_world_size(), **LAYOUTS[layout])
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
        chunks = [
            DistributedDataParallel(get_model_config(chunk), config, chunk)
            for chunk in chunks_of(source / name, division, train=train, recompute=recompute)
        ]
        of_model = get_model_config(chunks[0])
        of_model.finalize_model_grads_func = finalize_model_grads
        of_model.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
        for _ in range(2):  # in the second pass Megatron knows how many gradients are to come
            for chunk in chunks:
                chunk.zero_grad_buffer()
            place = parallel.position()
            scorer = RowScorer(chunks=chunks, place=place, layout=division)
            shares = torch.tensor(WEIGHTS).split([3, 1])[place.dp_rank :: place.dp_size]
            scorer.train(rows_of(source / name), lambda scores, index: _loss(scores, shares[index]))  # noqa: B023
        vision = unwrapped(chunks[0]).vision
        found[name] = {} if vision is None else gradients_of(vision)
    return found


def _loss(scores: RowScores, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (scores.logps * shares).sum(), scores.logps.detach()


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
    root = tmp_path_factory.mktemp("source")
    for name, config in tiny_vision.configs().items():
        tiny_vision.make_folder(root / name, config)
    return root


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor | None]]]:
    """Return, for each model, the log-probs of the documents, and the gradients of what is not the language model."""
    found = {}
    for name in MODELS:
        model = tiny_vision.load(source / name)
        shown = [each for row in tiny_vision.documents(model.config) for each in row]
        logps = torch.stack([tiny_vision.whole_logps(model, each) for each in shown])
        (logps * torch.tensor(WEIGHTS)).sum().backward()
        gradients = {
            each.removeprefix("model."): parameter.grad
            for each, parameter in model.named_parameters()
            if "language_model" not in each and "lm_head" not in each
        }
        found[name] = logps.detach(), gradients
    return found


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "DP2"])
def test_log_probs_equal_transformers(
    source: Path, expected: dict[str, Any], run_ranks: Callable[..., Any], layout: str
) -> None:
    """Of documents with none, one and two images, which differ: no feature is at another's place."""
    found = run_ranks(score, world_of(layout), source, layout)
    for name in MODELS:
        scored = [each[name] for each in found if each[name] is not None]
        assert scored
        for logps in scored:
            torch.testing.assert_close(logps, expected[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_autograd_through_transformers(
    source: Path, expected: dict[str, Any], run_ranks: Callable[..., Any], layout: str, overlap: bool
) -> None:
    for train in ("projector", "all"):
        found = run_ranks(differentiate, world_of(layout), source, layout, train, overlap)
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
    (model,) = chunks_of(folder, Layout(world_size=1), train=train)
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


# training

STEPS = 3
ADAM: dict[str, Any] = {"lr": 0.02, "betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.0}
"""With an epsilon beside which the rounding of small gradients is nothing."""
TRAINED = ("llava_clip", "qwen2_5_vl")


def learn(source: Path, layout: str, overlap: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Return what sees images in each model after some steps in which all of it is trained."""
    found = {}
    for name in TRAINED:
        division = Layout(world_size=dist.get_world_size(), **LAYOUTS[layout])
        optim = OptimConfig(**ADAM, overlap_grad_sync=overlap, overlap_param_sync=overlap)
        chunks = wrap_for_training(chunks_of(source / name, division, train="all"), optim)
        optimizer = make_optimizer(chunks, optim, params_dtype=torch.float32, gradient_clip=0.0)
        place = parallel.position()
        shares = torch.tensor(WEIGHTS).split([3, 1])[place.dp_rank :: place.dp_size]
        scorer = RowScorer(chunks=chunks, place=place, layout=division)
        for _ in range(STEPS):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            scorer.train(rows_of(source / name), lambda scores, index: _loss(scores, shares[index]))  # noqa: B023
            optimizer.step()
        if overlap:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        vision = unwrapped(chunks[0]).vision
        if vision is not None:
            found[name] = {vision.source_name(key): each.detach().clone() for key, each in vision.named_parameters()}
    return found


@pytest.fixture(scope="module")
def learned(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return all parameters of transformers' models after those steps of torch's Adam."""
    found = {}
    for name in TRAINED:
        model = tiny_vision.load(source / name)
        shown = [each for row in tiny_vision.documents(model.config) for each in row]
        optimizer = torch.optim.Adam(model.parameters(), lr=ADAM["lr"], betas=ADAM["betas"], eps=ADAM["eps"])
        for _ in range(STEPS):
            optimizer.zero_grad()
            logps = torch.stack([tiny_vision.whole_logps(model, each) for each in shown])
            (logps * torch.tensor(WEIGHTS)).sum().backward()
            optimizer.step()
        found[name] = {key.removeprefix("model."): each.detach() for key, each in model.named_parameters()}
    return found


@pytest.mark.parametrize(("layout", "overlap"), [("TP1", False), ("TP2_SP", False), ("DP2", True), ("CP2", True)])
def test_steps_of_adam_equal_those_with_transformers(
    source: Path,
    learned: dict[str, dict[str, torch.Tensor]],
    run_ranks: Callable[..., Any],
    layout: str,
    overlap: bool,
) -> None:
    """Also where a rank has no images, and what is to come of gradients and parameters comes in the background."""
    for found in run_ranks(learn, world_of(layout), source, layout, overlap):
        for name in TRAINED:
            assert len(found[name]) > 10
            for key, each in found[name].items():
                torch.testing.assert_close(each, learned[name][key], rtol=0, atol=2e-4)

"""Answers of the live model equal transformers' under every layout; draws, ends of answers and the cache itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.enums import AttnMaskType
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from nemo_kto.data.batches.packed_rows import pack_documents
from nemo_kto.errors import DataError
from nemo_kto.generation import decoding
from nemo_kto.generation.decoding import Sampling, generate, next_tokens
from nemo_kto.generation.rows import Prompt
from nemo_kto.kto.scoring import RowScorer
from nemo_kto.network.attention import CachedRowParams, DocumentAttention, DocumentParams
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.key_value_cache import KeyValueCache
from nemo_kto.network.lora import adapters_off, add_adapters
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.adapter_config import read_adapter_settings
from nemo_kto.weights.import_hf import import_hf
from nemo_kto.weights.peft_adapter import import_adapter
from tests.network import tiny_hf

LAYOUTS: dict[str, Layout] = {
    "ONE": Layout(world_size=1),
    "TP2": Layout(world_size=2, tensor=2),
    "TP2SP": Layout(world_size=2, tensor=2, sequence=True),
    "PP2": Layout(world_size=2, pipeline=2),
    "VPP2": Layout(world_size=2, pipeline=2, virtual=2),
    "CP2": Layout(world_size=2, context=2),
    "DP2": Layout(world_size=2),
    "EP2": Layout(world_size=2, expert=2),
    "TP2SP-CP2": Layout(world_size=4, tensor=2, sequence=True, context=2),
    "PP2-CP2": Layout(world_size=4, pipeline=2, context=2),
    "TP2SP-EP2": Layout(world_size=4, tensor=2, sequence=True, expert=2),
    "PP2-EP2": Layout(world_size=4, pipeline=2, expert=2),
    "TP2-WHOLE": Layout(world_size=2, tensor=2, sequence=True, expert_tensor=1),
    "CP4": Layout(world_size=4, context=4),  # more ranks than key/value heads
}
LENGTH = "phi3_longrope"  # the answer to the first prompt goes from its short factors to its long ones
DENSE = (
    *("llama", "mistral_window", "qwen3", "llama_tied", "llama3_rope_other", "qwen2_tied", "qwen2_window", LENGTH),
    *("yarn_rope", "llama_biases", "granite", "starcoder2_window", "gemma2", "gemma3_text", "glm4"),
    *("smollm3_pattern", "olmo2", "olmo3", "exaone4", "ministral3", "qwen3_5_text", "qwen3_5_text_tied"),
)
SPARSE = (
    "qwen3_moe",
    "mixtral",
    "qwen3_moe_mixed",
    "qwen2_moe",
    "qwen2_moe_mixed",
    "granitemoe",
    "glm4_moe",
    "minimax_m2",
    "deepseek_v3",
    "deepseek_v3_plain",
    "glm4_moe_lite",
    "qwen3_next",
    "qwen3_next_mixed",
    "qwen3_5_moe_text",
)
BIASED = ("gpt_oss", "gpt_oss_plain")
"""Mixtures whose experts are not divided."""
PROMPT_LENGTHS = (9, 1, 24, 58)  # the last two are longer than the sliding windows
MAX_NEW_TOKENS = 10
ANSWER_LENGTHS = [10, 10, 10, 6]  # the longest document ends at the last of 64 positions

Answers = list[list[int]]


def prompts() -> list[torch.Tensor]:
    """Return random prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, tiny_hf.VOCAB_SIZE, (length,), generator=generator) for length in PROMPT_LENGTHS]


# what transformers answers


@torch.no_grad()
def reference_answers(model: Any) -> Answers:
    """Return transformers' greedy answers, as long as possible, of one prompt at a time."""
    longest = model.config.max_position_embeddings
    return [
        model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            max_new_tokens=min(MAX_NEW_TOKENS, longest - len(prompt)),
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts()
    ]


@torch.no_grad()
def reference_logits(model: Any, answers: Answers) -> list[torch.Tensor]:
    """Return transformers' logits `[answer's tokens, v]` at each place of the answers, the text before it scored.

    With a rotary embedding that depends on a document's length, scoring whole documents once would be another thing.
    """
    return [
        torch.stack(
            [
                model(torch.cat([prompt, torch.tensor(answer[:end], dtype=torch.int64)])[None]).logits[0, -1]
                for end in range(len(answer))
            ]
        )
        for prompt, answer in zip(prompts(), answers, strict=True)
    ]


def load_reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def cut(answers: Answers, stop: int) -> Answers:
    """Return the answers up to and with the first `stop`."""
    return [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers]


def dividing_token(answers: Answers) -> int:
    """Return a token that ends some answers in their midst and others not at all."""
    for token in sorted({token for answer in answers for token in answer}):
        others = [answer for answer in answers if token not in answer]
        if others and any(token in answer[1:-1] and token != answer[0] for answer in answers):
            return token
    raise AssertionError("no token is in the midst of some answers only")


# what the ranks do


def build(folder: Path, layout: Layout, **options: Any) -> list[Any]:
    """Make Megatron's groups of `layout` and return the chunks of the model in `folder`."""
    enable_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(layout, seed=1)
    hf_config = load_hf_config(folder)
    chunks = [build_gpt(hf_config, layout, chunk=chunk, **options) for chunk in range(layout.virtual)]
    for chunk in chunks:
        import_hf(chunk, folder)
    return chunks


def answer(chunks: Sequence[Any], layout: Layout, sampling: Sampling, **options: Any) -> Answers:
    """Return the answers to all prompts, unless `options` say something else."""
    options = {"prompts": prompts(), "stop_token_ids": frozenset[int](), **options}
    given = options.pop("prompts")
    asked = [Prompt(tokens) for tokens in given]
    return generate(chunks, asked, sampling, layout=layout, place=parallel.position(), **options)


GREEDY = Sampling(max_new_tokens=MAX_NEW_TOKENS)
DRAWN = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1.3, top_p=0.9, seed=4)


def answer_under_layouts(
    source: Path, cases: list[tuple[str, str]], stops: dict[str, int]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what each model answers under each layout, in all the ways that must agree."""
    results = {}
    for name, family in cases:
        layout = LAYOUTS[name]
        chunks = build(source / family, layout)
        scorer = RowScorer(chunks=chunks, place=parallel.position(), layout=layout)
        rows = [pack_documents([(prompt, prompt[:3])]) for prompt in prompts()]
        before = scorer.score(rows)
        with recorded_logits() as cached_logits:
            cached = answer(chunks, layout, GREEDY)
        with recorded_logits() as plain_logits:
            plain = answer(chunks, layout, GREEDY, use_cache=False)
        results[name, family] = {
            "cached": cached,
            "plain": plain,
            "cached_logits": cached_logits,
            "plain_logits": plain_logits,
            "stopped": answer(chunks, layout, GREEDY, stop_token_ids=frozenset({stops[family]})),
            "drawn": answer(chunks, layout, DRAWN),
            "alone": answer(chunks, layout, GREEDY, prompts=prompts()[:1]),
        }
        after = scorer.score(rows)
        assert (before is None) is (after is None)
        assert before is None or torch.equal(before, after)
    return results


@contextmanager
def recorded_logits() -> Iterator[dict[tuple[int, int], torch.Tensor]]:
    """Yield, filled within the block, the logits of this rank's (prompt, place in the answer)."""
    logits: dict[tuple[int, int], torch.Tensor] = {}

    def record(scores: torch.Tensor, sampling: Sampling, numbers: list[int], steps: list[int]) -> torch.Tensor:
        logits.update(zip(zip(numbers, steps, strict=True), scores.clone(), strict=True))
        return next_tokens(scores, sampling, numbers, steps)

    with mock.patch.object(decoding, "next_tokens", record):
        yield logits


def answer_in_other_states(folder: Path, adapter: Path) -> dict[str, Any]:
    """Return what one process answers from a wrapped model, one that recomputes, one with adapters, and refusals."""
    layout = LAYOUTS["ONE"]
    chunks = build(folder, layout)
    results: dict[str, Any] = {"nothing": answer(chunks, layout, GREEDY, prompts=[])}
    for length in (0, 63, 64, 65):
        given = [torch.ones(3, dtype=torch.int64), torch.ones(length, dtype=torch.int64)]
        try:
            results[f"length {length}"] = [len(text) for text in answer(chunks, layout, GREEDY, prompts=given)]
        except DataError as error:
            results[f"length {length}"] = str(error)
    with pytest.raises(DataError) as beyond:
        answer(chunks, layout, GREEDY, prompts=[torch.tensor([1, tiny_hf.VOCAB_SIZE])])
    results["beyond"] = str(beyond.value)
    tokens: list[int] = []
    handle = chunks[0].register_forward_pre_hook(
        lambda _, __, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    answer(chunks, layout, GREEDY)
    handle.remove()
    results["tokens of passes"] = tokens
    chunks[0].eval()
    results["evaluating"] = answer(chunks, layout, GREEDY)
    wrapped = DistributedDataParallel(
        chunks[0].config, DistributedDataParallelConfig(use_distributed_optimizer=True), chunks[0]
    )
    results["wrapped"] = answer([wrapped], layout, GREEDY)
    for granularity, method in (("full", "uniform"), ("selective", None)):
        recompute = Recompute(granularity=granularity, method=method, num_layers=1)
        results[granularity] = answer(build(folder, layout, recompute=recompute), layout, GREEDY)
    return results | answer_with_adapters(folder, adapter, "ONE")


def answer_with_adapters(folder: Path, adapter: Path, name: str) -> dict[str, Any]:
    """Return what a model answers with its adapters on and off."""
    layout = LAYOUTS[name]
    chunks = build(folder, layout)
    add_adapters(chunks[0], read_adapter_settings(adapter))
    import_adapter(chunks[0], adapter)
    on = answer(chunks, layout, GREEDY)
    with adapters_off(chunks):
        return {"adapters on": on, "adapters off": answer(chunks, layout, GREEDY)}


# the models


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models made by transformers, and an adapter for one of them made by PEFT."""
    root = tmp_path_factory.mktemp("models")
    for name in (*DENSE, *SPARSE, *BIASED):
        tiny_hf.make_folder(root / name, tiny_hf.families()[name])
    settings = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules="all-linear", lora_dropout=0.1)
    adapted = get_peft_model(load_reference(root / "llama"), settings)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapted.save_pretrained(root / "adapter")
    return root


@pytest.fixture(scope="module")
def expected(source: Path) -> Callable[[str], Answers]:
    """Return a function that gives transformers' answers of a model."""
    return functools.cache(lambda family: reference_answers(load_reference(source / family)))


@pytest.fixture(scope="module")
def answered(
    source: Path, expected: Callable[[str], Answers], run_ranks: Callable[..., Any]
) -> Callable[[str, Sequence[str]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Return a function that gives, for a layout and model, each rank's results; models of a layout run together."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def get(name: str, families: Sequence[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
        missing = [(name, family) for family in families if (name, family) not in known]
        if missing:
            stops = {family: dividing_token(expected(family)) for _, family in missing}
            ranks = run_ranks(answer_under_layouts, LAYOUTS[name].world_size, source, missing, stops)
            known.update({case: [rank[case] for rank in ranks] for case in missing})
        return {(name, family): known[name, family] for family in families}

    return get


# the tests

MORE_CASES: list[tuple[str, tuple[str, ...]]] = [
    *((layout, DENSE) for layout in ("ONE", "TP2", "PP2", "VPP2", "TP2SP", "CP2", "DP2", "PP2-CP2")),
    ("CP4", tuple(name for name in DENSE if not name.startswith("qwen3_5"))),  # these have two key heads
    *((layout, SPARSE) for layout in ("ONE", "PP2", "TP2SP", "CP2", "DP2", "EP2", "TP2SP-EP2", "PP2-EP2")),
    *((layout, BIASED) for layout in ("ONE", "PP2", "TP2-WHOLE", "CP2", "CP4", "EP2")),
    ("TP2SP-CP2", ("mistral_window", "qwen3_moe", LENGTH)),
]


def check(results: Any, source: Path, expected: Callable[[str], Answers]) -> None:
    """Compare what every rank answered with transformers."""
    for (_, family), ranks in results.items():
        wanted = expected(family)
        assert [len(text) for text in wanted] == ANSWER_LENGTHS
        stop = dividing_token(wanted)
        for rank in ranks:
            assert rank["cached"] == wanted
            assert rank["plain"] == wanted
            assert rank["stopped"] == cut(wanted, stop)
            assert rank["alone"] == wanted[:1]
            assert rank["drawn"] == ranks[0]["drawn"]
        wanted_logits = reference_logits(load_reference(source / family), wanted)
        for way in ("cached_logits", "plain_logits"):
            logits = {place: scores for rank in ranks for place, scores in rank[way].items()}
            assert logits.keys() == {(number, step) for number, text in enumerate(wanted) for step in range(len(text))}
            for (number, step), scores in logits.items():
                torch.testing.assert_close(scores, wanted_logits[number][step], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "families"),
    [
        (
            "ONE",
            (
                *("llama", "mistral_window", "qwen3", "qwen3_moe", LENGTH),
                *("yarn_rope", "granite", "starcoder2_window", "gemma2", "gemma3_text", "glm4", "glm4_moe"),
                *("smollm3_pattern", "olmo2", "olmo3", "minimax_m2", "ministral3", "gpt_oss", "deepseek_v3"),
                *("qwen3_next_mixed", "qwen3_5_text", "exaone4"),
            ),
        ),
        ("TP2", ("llama", "qwen3")),
        ("PP2", ("llama", "mistral_window")),
        ("VPP2", ("llama",)),
        ("TP2SP", ("mistral_window", "qwen3_moe")),
        ("CP2", ("mistral_window", "gpt_oss", "qwen3_5_text")),
        ("EP2", ("qwen3_moe", "qwen2_moe_mixed", "deepseek_v3_plain")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES),
    ],
)
def test_answers_equal_transformers(
    source: Path,
    expected: Callable[[str], Answers],
    answered: Callable[..., Any],
    layout: str,
    families: tuple[str, ...],
) -> None:
    check(answered(layout, families), source, expected)


@pytest.mark.parametrize(
    ("layout", "family"), [("TP2", "llama"), ("PP2", "llama"), ("CP2", "mistral_window"), ("EP2", "qwen3_moe")]
)
def test_layouts_draw_the_same_answers(
    expected: Callable[[str], Answers], answered: Callable[..., Any], layout: str, family: str
) -> None:
    alone = answered("ONE", (family,))["ONE", family][0]["drawn"]
    assert answered(layout, (family,))[layout, family][0]["drawn"] == alone
    assert alone != expected(family)


@pytest.fixture(scope="module")
def other_states(source: Path, run_ranks: Callable[..., Any]) -> dict[str, Any]:
    """Return the results of `answer_in_other_states`."""
    results: dict[str, Any] = run_ranks(answer_in_other_states, 1, source / "llama", source / "adapter")[0]
    return results


@pytest.mark.parametrize("state", ["evaluating", "wrapped", "full", "selective", "adapters off"])
def test_the_state_of_the_model_does_not_matter(
    expected: Callable[[str], Answers], other_states: dict[str, Any], state: str
) -> None:
    assert other_states[state] == expected("llama")


def test_adapters_answer_as_with_peft(
    source: Path, expected: Callable[[str], Answers], other_states: dict[str, Any], run_ranks: Callable[..., Any]
) -> None:
    wanted = reference_answers(PeftModel.from_pretrained(load_reference(source / "llama"), source / "adapter").eval())
    assert wanted != expected("llama")
    assert other_states["adapters on"] == wanted
    for rank in run_ranks(answer_with_adapters, 2, source / "llama", source / "adapter", "TP2SP"):
        assert rank == {"adapters on": wanted, "adapters off": expected("llama")}


def test_a_pass_is_of_the_newest_tokens_only(other_states: dict[str, Any]) -> None:
    """First the prompts; then a token of each document, of which the longest is the first to end."""
    assert other_states["tokens of passes"] == [sum(PROMPT_LENGTHS), *[4] * 5, *[3] * 4]


def test_a_prompt_needs_tokens_and_room_for_an_answer(other_states: dict[str, Any]) -> None:
    assert other_states["nothing"] == []
    assert other_states["length 63"] == [10, 1]
    for length in (0, 64, 65):
        assert other_states[f"length {length}"].startswith(
            f"Prompt 2 has {length} tokens; to be answered it needs 1 to 63, as the model has 64 positions."
        )


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(other_states: dict[str, Any]) -> None:
    """Its embedding would be zeros: a row of padding."""
    wanted = f"Prompt 1 holds the token number {tiny_hf.VOCAB_SIZE}, which the model lacks; its numbers end at "
    assert other_states["beyond"].startswith(wanted + str(tiny_hf.VOCAB_SIZE - 1))


# draws

PROBABILITIES = [0.15, 0.5, 0.05, 0.3]


def frequencies(sampling: Sampling, *, draws: int = 3000) -> list[float]:
    """Return how often each token is drawn from `PROBABILITIES`."""
    logits = torch.tensor(PROBABILITIES).log().expand(draws, -1)
    drawn = next_tokens(logits, sampling, list(range(draws)), [7] * draws)
    return (torch.bincount(drawn, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected_frequencies"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # squares, made to sum to one
        (1.0, 0.7, [0.0, 0.5 / 0.8, 0.0, 0.3 / 0.8]),  # two tokens reach 0.7
        (1.0, 0.9, [0.15 / 0.95, 0.5 / 0.95, 0.0, 0.3 / 0.95]),
        (0.5, 0.9, [0.0, 0.25 / 0.34, 0.0, 0.09 / 0.34]),  # after division by the temperature: 0.34 / 0.365 = 0.93
        (1.0, 0.01, [0.0, 1.0, 0.0, 0.0]),
        (0.0, 1.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_probable(
    temperature: float, top_p: float, expected_frequencies: list[float]
) -> None:
    found = frequencies(Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p))
    for actual, wanted in zip(found, expected_frequencies, strict=True):
        # four standard deviations of 3000 draws; what cannot be drawn is not
        assert abs(actual - wanted) <= 4 * (wanted * (1 - wanted) / 3000) ** 0.5


def test_a_draw_depends_on_seed_prompt_and_token_alone() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=1, temperature=1.0)
    numbers, steps = list(range(64)), [3] * 64
    drawn = next_tokens(logits, sampling, numbers, steps)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(next_tokens(logits[order], sampling, order, steps), drawn[order])
    same_row = logits[:1].expand(64, -1)
    assert len(set(next_tokens(same_row, sampling, numbers, steps).tolist())) > 10
    assert len(set(next_tokens(same_row, sampling, [5] * 64, numbers).tolist())) > 10
    assert not torch.equal(next_tokens(logits, replace(sampling, seed=1), numbers, steps), drawn)


def test_diverged_logits_still_give_tokens() -> None:
    logits = torch.full((2, 5), float("nan"))
    for temperature in (0.0, 1.0):
        tokens = next_tokens(logits, Sampling(max_new_tokens=1, temperature=temperature, top_p=0.9), [0, 1], [0, 0])
        assert ((tokens >= 0) & (tokens < 5)).all()


# the cache


def attention(window: int | None) -> DocumentAttention:
    """Build a module of four heads that share two key/value heads of eight channels."""
    config = ModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, window_size=None if window is None else (window, 0)
    )
    groups = SimpleNamespace(cp=None)
    return DocumentAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def attend(module: DocumentAttention, parts: Sequence[torch.Tensor], lengths: list[int], cache: Any) -> torch.Tensor:
    """Return the output `[T, 32]` for query, key and value `[T, heads, 8]` of documents of `lengths`."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    described: dict[str, Any] = {"qkv_format": "sbhd", "cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries}
    described["lengths"] = tuple(lengths)
    params = DocumentParams(**described) if cache is None else CachedRowParams(**described, cache=cache)
    output: torch.Tensor = module(*(part[:, None] for part in parts), None, packed_seq_params=params)[:, 0]
    return output


@pytest.mark.parametrize("window", [None, 5, 80])
def test_newest_tokens_attend_as_in_whole_documents(window: int | None) -> None:
    """Documents grow by 200 tokens, through several enlargements of the memory, and one leaves on the way."""
    starts, total, fillers = [3, 90, 1], 290, 2
    generator = torch.Generator().manual_seed(0)
    documents = [[torch.randn(total, heads, 8, generator=generator) for heads in (4, 2, 2)] for _ in starts]
    filler = [torch.randn(fillers, heads, 8, generator=generator) for heads in (4, 2, 2)]
    module, cache, device = attention(window), KeyValueCache(), torch.device("cpu")
    whole = [attend(module, document, [total], None) for document in documents]

    cache.begin(starts, device)
    row = [
        torch.cat([*(document[part][:start] for document, start in zip(documents, starts, strict=True)), filler[part]])
        for part in range(3)
    ]
    first = attend(module, row, [*starts, fillers], cache)
    wanted = [document[:start] for document, start in zip(whole, starts, strict=True)]
    torch.testing.assert_close(first[: sum(starts)], torch.cat(wanted), rtol=0, atol=2e-6)
    kept = [0, 1, 2]
    for step in range(200):
        if step == 100:
            cache.keep([0, 2])
            kept = [0, 2]
        places = [starts[number] + step for number in kept]
        cache.begin([place + 1 for place in places], device)
        row = [
            torch.cat([*(documents[n][part][p : p + 1] for n, p in zip(kept, places, strict=True)), filler[part]])
            for part in range(3)
        ]
        output = attend(module, row, [*[1] * len(kept), fillers], cache)
        wanted = [whole[n][p : p + 1] for n, p in zip(kept, places, strict=True)]
        torch.testing.assert_close(output[: len(kept)], torch.cat(wanted), rtol=0, atol=2e-6)
        assert (output[len(kept) :] == 0).all()


def test_a_cache_without_documents_leaves_only_fillers() -> None:
    module, cache = attention(None), KeyValueCache()
    filler = [torch.randn(2, heads, 8) for heads in (4, 2, 2)]
    for _ in range(2):
        cache.begin([], torch.device("cpu"))
        output = attend(module, filler, [2], cache)
    assert (output == 0).all()

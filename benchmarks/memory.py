"""Peak memory of a training micro-batch and of the output layer within it, against row length and vocabulary.

python benchmarks/memory.py [--rounds N]

A Llama of 2 layers and hidden size 256 in float32 trains on one document per row, of which half are response tokens:
rows of 512 to 16k tokens with a vocabulary of 32k, then vocabularies of 32k to 256k with a row of 2k tokens. Each
point is measured in a process of its own, as its peak above what was held just before; a first call on a few tokens
warms up what libraries keep. All figures are medians of the rounds.

"micro-batch" is forward and backward of the whole model on the product's own path (`RowScorer.train`, wrapped for
data parallelism, so the gradients' buffer is held before). "head" is `response_token_logps` alone, forward and
backward, with its default settings. Two parts of it are no working memory: the gradient of the output weight, as
large as that weight, and that of the hidden states, [tokens, hidden]. "head, rest" is what remains without them; it
must not grow beyond a constant in either sweep. "plain head" is torch's `cross_entropy(hidden @ weight.T)`, forward
and backward on the same tensors, which keeps all logits: a fair comparison of memory, as both leave the same
gradients, but not of time, as the product may compute the logits twice.

On a CPU peaks are those of the resident set; small blocks are given back at once (MALLOC_MMAP_THRESHOLD_), which
makes them exact to a few MB, and steps slower. With a GPU they are those of torch's allocator on the device.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import in_new_process, peak_bytes, print_table, publish, reset_peak

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
LENGTH, VOCABULARY, HIDDEN = 2048, 32_768, 256
WARM_UP_TOKENS = 8
MB = 1e6


def main() -> None:
    """Measure both sweeps and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # read by the processes that measure, when they start
    points = [(length, VOCABULARY) for length in LENGTHS]
    points += [(LENGTH, vocabulary) for vocabulary in VOCABULARIES if (LENGTH, vocabulary) not in points]
    runs = {"micro-batch": peak_of_model, "head": peak_of_head, "plain head": peak_of_plain_head}
    peaks: dict[tuple[int, int], dict[str, list[int]]] = {point: {name: [] for name in runs} for point in points}
    for _ in range(options.rounds):
        for point in points:
            for name, run in runs.items():
                peaks[point][name].append(in_new_process(run, *point))
    medians = {point: {name: statistics.median(found) for name, found in peaks[point].items()} for point in points}
    sweeps = {
        "memory": [(length, VOCABULARY) for length in LENGTHS],
        "memory against the vocabulary": [(LENGTH, vocabulary) for vocabulary in VOCABULARIES],
    }
    tables = {title: [row_of(point, medians[point]) for point in chosen] for title, chosen in sweeps.items()}
    by_length, by_vocabulary = tables.values()
    raw = [{"tokens": tokens, "vocabulary": vocabulary, **peaks[tokens, vocabulary]} for tokens, vocabulary in points]
    print_table("memory against the vocabulary", by_vocabulary)
    publish("memory", by_length, against_vocabulary=by_vocabulary, peaks=raw, rounds=options.rounds, hidden=HIDDEN)


def row_of(point: tuple[int, int], peak: dict[str, float]) -> dict[str, Any]:
    """Return one line of a table, in MB."""
    tokens, vocabulary = point
    weight, states = 4 * vocabulary * HIDDEN, 4 * (tokens // 2) * HIDDEN
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "micro-batch [MB]": f"{peak['micro-batch'] / MB:.0f}",
        "head [MB]": f"{peak['head'] / MB:.0f}",
        "weight's gradient [MB]": f"{weight / MB:.0f}",
        "hidden's gradient [MB]": f"{states / MB:.1f}",
        "head, rest [MB]": f"{(peak['head'] - weight - states) / MB:.0f}",
        "plain head [MB]": f"{peak['plain head'] / MB:.0f}",
    }


def device() -> str:
    """Return where the models are."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_of(step: Callable[[], object]) -> int:
    """Return the greatest memory in bytes during `step`, above that before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset_peak()
    before = peak_bytes()
    step()
    return peak_bytes() - before


def head_tensors(responses: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states `[responses, HIDDEN]`, weight `[vocabulary, HIDDEN]`, target ids `[responses]`."""
    torch.manual_seed(0)
    hidden = torch.randn(responses, HIDDEN, device=device(), requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, HIDDEN, device=device())).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (responses,), device=device())


def peak_of_head(tokens: int, vocabulary: int) -> int:
    """Return the peak of the product's output layer, forward and backward."""
    from nemo_kto.algorithms.logprobs import response_token_logps

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
        response_token_logps(hidden, weight, targets, vocab_size=weight.shape[0]).sum().backward()

    return peak_of_step(step, tokens, vocabulary)


def peak_of_plain_head(tokens: int, vocabulary: int) -> int:
    """Return the peak of torch's cross entropy of all logits, forward and backward."""

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

    return peak_of_step(step, tokens, vocabulary)


def peak_of_step(step: Callable[..., None], tokens: int, vocabulary: int) -> int:
    """Return the peak of a head on half of the tokens."""
    step(*head_tensors(WARM_UP_TOKENS, 2 * WARM_UP_TOKENS))
    tensors = head_tensors(tokens // 2, vocabulary)
    return peak_of(lambda: step(*tensors))


def peak_of_model(tokens: int, vocabulary: int) -> int:
    """Return the peak of one training micro-batch of the whole model."""
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    from nemo_kto.data.batches.packed_rows import PackedRow, pack_documents
    from nemo_kto.kto.scoring import RowScorer
    from nemo_kto.runtime import parallel
    from nemo_kto.runtime.layout import Layout

    def row(length: int) -> PackedRow:
        ids = torch.randint(vocabulary, (length,))
        return pack_documents([(ids[: length // 2], ids[length // 2 :])])

    silence_loaded_packages()
    layout = Layout(world_size=1)
    with parallel.default_group():
        parallel.initialize(layout, seed=1)
        scorer = RowScorer(chunks=[wrapped_model(vocabulary, layout)], place=parallel.position(), layout=layout)
        scorer.train([row(WARM_UP_TOKENS)], sum_of_logps)
        measured = row(tokens)
        return peak_of(lambda: scorer.train([measured], sum_of_logps))


def sum_of_logps(scores: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of a micro-batch's log-probs as its loss."""
    return scores.logps.sum(), scores.logps.detach()


def wrapped_model(vocabulary: int, layout: Any) -> torch.nn.Module:
    """Return the model as training has it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.utils import get_model_config

    from nemo_kto.network.gpt import build_gpt, initialize_weights
    from nemo_kto.network.hf_config import hf_config_from_sizes

    hf_config = hf_config_from_sizes(
        num_layers=2,
        hidden_size=HIDDEN,
        ffn_hidden_size=704,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=vocabulary,
        max_position_embeddings=max(LENGTHS),
    )
    model = build_gpt(hf_config, layout)
    initialize_weights(model, seed=0, std=0.02)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(get_model_config(model), settings, model)


if __name__ == "__main__":
    main()

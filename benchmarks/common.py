"""What the benchmarks share: shapes of models, feedback, the machine's description, clocks, counters, and how
results are shown.

Import it before anything that prints at its import: it silences that. Nothing here needs nemo_kto at module level, as
the peer's process of `against_trl.py` has an environment of its own.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SHAPES: dict[str, dict[str, Any]] = {
    # most of the work is the output layer
    "head-heavy, 56 M": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # most of it are the layers
    "body-heavy, 155 M": {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    # SmolLM2-135M's
    "135 M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    # layers as wide as those of 1B models, which weigh more than what a step keeps of its tokens
    "wide, 106 M": {
        "vocab_size": 4096,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
"""Name -> fields of a LlamaConfig."""

GPU_SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B's
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    # Llama-3-8B's: with LoRA, as the optimizer's state for all weights is more than a GPU has
    "8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""The same, for GPUs; saved in bfloat16."""

if find_spec("nemo_kto") is not None:
    from nemo_kto.quiet import silence_startup_noise

    silence_startup_noise()

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
"""Where each benchmark leaves its figures as JSON."""


OPTIMIZER = "optimizer's step"
"""Name of the `record_function` that tells `shares` what is the optimizer's."""

_PYTHON = "Python, autograd, waiting"
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_COPIES = {
    *("copy_", "cat", "stack", "clone", "fill_", "zero_", "index", "index_select", "gather", "scatter_add_"),
    *("embedding_dense_backward", "index_put_", "_index_put_impl_", "slice_backward", "select_backward"),
}
"""Names of operators."""


def make_model(folder: Path, *, max_position_embeddings: int = 1024, **sizes: Any) -> int:
    """Save a Llama, or with `num_local_experts` a Mixtral, with random weights and a tokenizer of one token a word.

    Returns:
        Its number of parameters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words(sizes["vocab_size"])])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if sizes in GPU_SHAPES.values() else torch.float32
    kind = MixtralConfig if "num_local_experts" in sizes else LlamaConfig
    config = kind(max_position_embeddings=max_position_embeddings, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def words(vocab_size: int) -> list[str]:
    """Return the words of a vocabulary."""
    return [f"w{index}" for index in range(vocab_size - 2)]


def write_feedback(
    file: Path,
    number: int,
    *,
    vocab_size: int,
    prompt: tuple[int, int] = (20, 240),
    response: tuple[int, int] = (10, 190),
    seed: int = 0,
) -> None:
    """Write records whose lengths are drawn evenly from the given ranges, by default 130 and 100 tokens on average."""
    generator, vocabulary = random.Random(seed), words(vocab_size)
    with file.open("w", encoding="utf-8") as stream:
        for index in range(number):
            record = {
                "prompt": " ".join(generator.choices(vocabulary, k=generator.randint(*prompt))),
                "completion": " " + " ".join(generator.choices(vocabulary, k=generator.randint(*response))),
                "label": index % 2 == 0,
            }
            stream.write(json.dumps(record) + "\n")


def make_config(folder: Path, *, global_batch_size: int, micro_batch_size: int) -> Any:
    """Return a KTOConfig: the model in `folder`/hf, the data in `folder`/train.jsonl; no checkpoints, no export."""
    from nemo_kto.config.schema import KTOConfig

    config = KTOConfig()
    config.pretrained_checkpoint.restore_from_path = str(folder / "hf")
    config.exp_manager.explicit_log_dir = str(folder / "log")
    config.exp_manager.create_checkpoint_callback = False
    config.export.enabled = False
    config.report.enabled = False
    config.trainer.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    config.model.global_batch_size = global_batch_size
    config.model.micro_batch_size = micro_batch_size
    config.model.data.data_prefix.train = [str(folder / "train.jsonl")]
    return config


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each of `rounds`, A B A B ...; a first round that is not counted warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds_of(run)
            if number:
                seconds[name].append(taken)
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Return how long `run` takes, a GPU's work included."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def synchronize() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (least-greatest)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def new_profiler() -> profile:
    """Return a profiler for `shares`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    return profile(activities=activities, record_shapes=True)


def shares(profiler: profile, seconds: float, *, vocab_size: int) -> Counter[str]:
    """Return kind of work -> its share of `seconds`, the whole time profiled; Python's is what no operator has."""
    found: Counter[str] = Counter()
    for event in profiler.events():
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        found[_kind(event, vocab_size)] += own / 1e6 / seconds
    found[_PYTHON] += 1 - found.total()
    return found


def _kind(event: Any, vocab_size: int) -> str:
    caller = event
    while caller is not None:
        if caller.name == OPTIMIZER:
            return "optimizer"
        caller = caller.cpu_parent
    name = event.name.removeprefix("aten::")
    if name == event.name:
        return _PYTHON
    if name in _PRODUCTS:
        return "matrix products"
    if "attention" in name:
        return "attention"
    if any(shape and shape[-1] == vocab_size for shape in event.input_shapes):
        return "softmax over the vocabulary"
    return "copies, fills, look-ups" if name in _COPIES else "norms, activations, other pointwise work"


def reset_peak() -> None:
    """Make `peak_bytes` forget what was before (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Return the greatest resident set of this process since `reset_peak`, in bytes (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def machine() -> dict[str, Any]:
    """Return a description of the machine and of the packages that matter."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    for package in ("torch", "megatron-core", "transformer-engine", "transformers", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows, all with the same keys, as a table."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows)])


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows, all with the same keys, as a Markdown table."""
    print(f"\n{title}\n\n{markdown(rows)}")


def publish(name: str, rows: Iterable[Mapping[str, Any]], **facts: Any) -> None:
    """Print rows, all with the same keys, as a Markdown table, and write them with the machine and `facts` as JSON."""
    rows = list(rows)
    print_table(name, rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine(), **facts, "rows": rows}
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{json.dumps(content['machine'])}\nwritten to {file}")

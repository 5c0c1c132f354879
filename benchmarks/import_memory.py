"""Host memory and time of one rank that reads its part of a Hugging Face checkpoint, of a dense model and a mixture.

python benchmarks/import_memory.py [--rounds N] [--shape dense|mixture] [--quantize nf4|nf4_double|int8]

The dense one has the shape of Llama-3-8B, 16 GB of bfloat16; the mixture 6 of the 48 layers of Qwen3-30B-A3B, each
with 128 experts, 8 GB. They are in files of at most 5 GB with an index, as the real ones are, but the files are
sparse: headers, then a length without data, so that they read as zeros and take no room on a disk. Each case is a
process of its own that is one rank of the whole layout: torch's "fake" backend makes the groups without the other
ranks, which is fair because reading a checkpoint takes no communication. It builds its part of the model and fills it
as training does (`build_gpt`, `import_hf`), on the first and on the last stage.

"peak" is the greatest anonymous memory (RssAnon, read every few milliseconds) above that before the model was built.
Beside it stands the rank's shard, the sum of its parameters: a ratio of 1 means that nothing is ever held twice. Pages
of the mapped files are the kernel's page cache, which shrinks when memory is short, and stand apart. With a GPU the
shard lies on it, and the ratio says how much of it the host holds at a time.

What it does not show: how fast a disk is (there are no data on it; the times are those of the page cache and of
copying), the reference's copy of the weights, and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import GPU_SHAPES, in_new_process, median_and_range, publish, synchronize
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig


def shapes() -> dict[str, PretrainedConfig]:
    """Return the configuration of each model."""
    dense = {**GPU_SHAPES["8B"], "max_position_embeddings": 8192, "rope_theta": 500_000.0, "dtype": "bfloat16"}
    mixture = {
        **{"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
        **{"num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "dtype": "bfloat16"},
    }
    return {"dense": LlamaConfig(**dense), "mixture": Qwen3MoeConfig(**mixture)}


CASES: dict[str, tuple[dict[str, int], ...]] = {
    "dense": ({"tensor": 8}, {"tensor": 2, "pipeline": 4}, {"pipeline": 8}),
    "mixture": ({"expert": 8}, {"pipeline": 2, "expert": 4}),
}
"""Shape -> how it is divided."""
FILE_BYTES = 5 * 10**9
"""The largest a file becomes; the real checkpoint's limit."""
ITEM_BYTES = 2
POLL_SECONDS = 0.002


@dataclass(frozen=True, kw_only=True)
class Import:
    """What one import took; bytes and seconds.

    Attributes:
        shard: Sum of the rank's parameters.
        peak: Greatest anonymous memory above that before the model was built.
        left: Anonymous memory in the end, above the same.
        mapped: Greatest memory of mapped files above the same.
        at: What was read when anonymous memory was greatest.
        build: To build the model.
        check: To open the files and compare all names and shapes.
        listing: To list the blocks that the rank holds.
        copy: To read these and copy them into the parameters.
        kernel: Share of the whole that was spent in the kernel: on page faults.
    """

    shard: int
    peak: int
    left: int
    mapped: int
    at: str
    build: float
    check: float
    listing: float
    copy: float
    kernel: float


def main() -> None:
    """Measure the first and the last stage of each layout; show the first import's memory, medians of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed imports of each case")
    parser.add_argument("--shape", choices=[*CASES], help="one model only")
    parser.add_argument("--quantize", choices=["nf4", "nf4_double", "int8"], help="keep linear layers in fewer bits")
    options = parser.parse_args()
    rows, imports, totals = [], {}, {}
    for shape in CASES if options.shape is None else [options.shape]:
        with tempfile.TemporaryDirectory() as name:
            totals[shape] = write_sparse_checkpoint(Path(name), shapes()[shape])
            for sizes in CASES[shape]:
                stages = sizes.get("pipeline", 1)
                for stage in sorted({0, stages - 1}):
                    division = " ".join(f"{kind} {size}" for kind, size in sizes.items())
                    title = f"{shape}, {division}, stage {stage + 1} of {stages}"
                    found = in_new_process(measure, Path(name), sizes, stage, options.rounds, options.quantize)
                    imports[title] = [asdict(one) for one in found]
                    rows.append(row_of(title, found[0], found[1:]))
    publish("import_memory", rows, checkpoint_bytes=totals, rounds=options.rounds, imports=imports)


def row_of(title: str, first: Import, others: list[Import]) -> dict[str, str]:
    """Return one line of the table."""
    copy = statistics.median(one.copy for one in others)
    return {
        "layout": title,
        "shard": f"{first.shard / 1e9:.2f} GB",
        "peak": f"{first.peak / 1e9:.2f} GB",
        "peak / shard": f"{first.peak / first.shard:.2f}",
        "in the end": f"{first.left / first.shard:.2f}",
        "peak while reading": first.at,
        "mapped files": f"{first.mapped / 1e9:.2f} GB",
        "build [s]": median_and_range([one.build for one in others]),
        "check and list [s]": median_and_range([one.check + one.listing for one in others]),
        "read and copy [s]": median_and_range([one.copy for one in others]),
        "GB/s": f"{first.shard / 1e9 / copy:.2f}",
        "in the kernel": f"{statistics.median(one.kernel for one in others):.0%}",
    }


def measure(folder: Path, sizes: dict[str, int], stage: int, rounds: int, quantised: str | None) -> list[Import]:
    """Build and read the part of the first rank of a stage, once and `rounds` times more.

    In a process of its own: only the first time nothing is left in memory from before.
    """
    from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise

    silence_startup_noise()
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_kto.network import gpt  # noqa: F401  what is measured is not to import them
    from nemo_kto.runtime import parallel
    from nemo_kto.runtime.bits import bitsandbytes
    from nemo_kto.runtime.cpu_megatron import enable_cpu
    from nemo_kto.runtime.layout import Layout
    from nemo_kto.weights import import_hf  # noqa: F401

    silence_loaded_packages()
    bitsandbytes()
    if torch.cuda.is_available():
        torch.cuda.init()
    else:
        enable_cpu()
    layout = Layout(world_size=math.prod(sizes.values()), **sizes)
    first = stage * layout.world_size // layout.pipeline
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=layout.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor_size,
        create_gloo_process_groups=False,  # those need the other ranks
    )
    parallel.initialize(layout, seed=1)  # finds the groups made
    return [measure_once(folder, layout, quantised) for _ in range(rounds + 1)]


def measure_once(folder: Path, layout: Any, quantised: str | None) -> Import:
    """Build and read this rank's part, and forget it again."""
    from nemo_kto.network.gpt import build_gpt
    from nemo_kto.network.hf_config import load_hf_config
    from nemo_kto.weights.import_hf import import_hf

    hf_config = load_hf_config(folder)
    with Clocks() as clocks, MemoryPoll(clocks) as poll:
        started, in_kernel = time.perf_counter(), os.times().system
        model = build_gpt(hf_config, layout, params_dtype=torch.bfloat16, quantised=quantised)
        build = time.perf_counter() - started
        import_hf(model, folder)
        synchronize()
        whole = time.perf_counter() - started
        in_kernel = os.times().system - in_kernel
        left = memory("RssAnon") - poll.before["RssAnon"]
    for parameter in model.parameters():
        assert not parameter.any(), "the checkpoint holds zeros only"
    check, listing = clocks.seconds["_check_tensors"], clocks.seconds["sharded_leaves"]
    return Import(
        shard=sum(map(bytes_of, model.parameters())),
        peak=poll.peak["RssAnon"] - poll.before["RssAnon"],
        left=left,
        mapped=poll.peak["RssFile"] - poll.before["RssFile"],
        at=poll.at,
        build=build,
        check=check,
        listing=listing,
        copy=whole - build - check - listing,
        kernel=in_kernel / whole,
    )


def bytes_of(parameter: torch.Tensor) -> int:
    """Return what a parameter takes; one in fewer bits is made of several tensors."""
    return sum(part.nbytes for part in getattr(parameter, "parts", {"": parameter}).values())


class Clocks:
    """Times the parts of `import_hf` and notes which tensor it reads; a context manager.

    Attributes:
        seconds: Name of the function -> seconds in it.
        reading: The tensor that was read last.
    """

    def __init__(self) -> None:
        self.seconds = {"_check_tensors": 0.0, "sharded_leaves": 0.0}
        self.reading = "nothing"
        self._patches: list[Any] = []

    def __enter__(self) -> Clocks:
        """Start."""
        from nemo_kto.weights import import_hf

        check, leaves, read = import_hf._check_tensors, import_hf.sharded_leaves, import_hf.SafetensorsFolder.read
        self._patches = [
            mock.patch.object(import_hf, "_check_tensors", partial(self._timed, check)),
            mock.patch.object(import_hf, "sharded_leaves", partial(self._timed_iterator, leaves)),
            mock.patch.object(import_hf.SafetensorsFolder, "read", self._noting(read)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        for patch in self._patches:
            patch.stop()

    def _timed(self, check: Callable[..., None], *arguments: Any) -> None:
        started = time.perf_counter()
        check(*arguments)
        self.seconds["_check_tensors"] += time.perf_counter() - started

    def _timed_iterator(self, leaves: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        iterator = leaves(*arguments)
        while True:
            started = time.perf_counter()
            leaf = next(iterator, None)
            self.seconds["sharded_leaves"] += time.perf_counter() - started
            if leaf is None:
                return
            yield leaf

    def _noting(self, read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noting(source: Any, piece: Any, region: Any) -> torch.Tensor:
            self.reading = piece.name
            return read(source, piece, region)

        return noting


class MemoryPoll:
    """Follows this process's memory in a thread; a context manager.

    Attributes:
        before: Bytes of each kind when it began.
        peak: The greatest bytes of each kind.
        at: What was read when the anonymous memory was greatest.
    """

    def __init__(self, clocks: Clocks) -> None:
        self.before: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.at = ""
        self._clocks = clocks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> MemoryPoll:
        """Begin."""
        self.before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
        self.peak = dict(self.before)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            for kind in self.peak:
                now = memory(kind)
                if now > self.peak[kind]:
                    self.peak[kind] = now
                    if kind == "RssAnon":
                        self.at = self._clocks.reading


def memory(kind: str) -> int:
    """Return this process's bytes of one kind, such as RssAnon or RssFile (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def write_sparse_checkpoint(folder: Path, config: PretrainedConfig) -> int:
    """Write configuration, index and files of zeros without data on the disk; return the bytes of all tensors."""
    from nemo_kto.network.families import family_of
    from nemo_kto.network.weight_rules import expected_shapes

    config.save_pretrained(folder)
    tensors = expected_shapes(family_of(config).rules(config))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if files[-1] and sum(map(size_of, files[-1].values())) + size_of(shape) > FILE_BYTES:
            files.append({})
        files[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_sparse_file(folder / file, content)
        weight_map |= dict.fromkeys(content, file)
    total = sum(map(size_of, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def write_sparse_file(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file with its header only: its length in 8 bytes, itself, then a hole for the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size_of(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def size_of(shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of bfloat16."""
    return ITEM_BYTES * torch.Size(shape).numel()


if __name__ == "__main__":
    main()

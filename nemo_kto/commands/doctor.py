"""`nemo-kto doctor`: what would stop a long job, looked for in less than a minute before it is queued."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from nemo_kto.commands import doctor_places as places
from nemo_kto.commands.doctor_places import Finding, Level
from nemo_kto.config.compose import load_config
from nemo_kto.config.folders import model_folder, tokenizer_folder
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.records import BadRecord
from nemo_kto.data.tokens.tokenization import EncodedRecord, Encoder
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import KTOError
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.early import check_early
from nemo_kto.runs.layout import layout_of
from nemo_kto.runs.model import accelerator_of, hf_config_of
from nemo_kto.runs.records import image_tokens, sources, tokenization_settings
from nemo_kto.runtime.versions import TESTED, untested

_SAMPLE = 256
"""Records of each entry of the data that are looked at."""

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def run(options: argparse.Namespace) -> None:
    """Print what was found; exit code 1 if something is wrong. Of several ranks one looks, the others meet it."""
    if not is_global_rank_zero():
        list(_looked_at("ranks", places.ranks))
        return
    found = list(_findings(options.overrides))
    if options.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        console = Console(soft_wrap=True)
        for one in found:
            console.print(Text.assemble((f"{one.level:8}", _STYLES[one.level]), f"{one.topic}: {one.text}"))
    if any(one.level == "error" for one in found):
        raise SystemExit(1)


def _findings(overrides: list[str]) -> Iterator[Finding]:
    yield from _looked_at("versions", _versions)
    yield from _looked_at("devices", _devices)
    yield from _looked_at("port", places.port)
    yield from _looked_at("ranks", places.ranks)
    if not overrides:
        yield Finding("ok", "configuration", "none was given; add the KEY=VALUE of a run to have it looked at")
        return
    try:
        config = load_config(overrides)
        check_early(config, "train", locks=False)
    except KTOError as error:
        yield Finding("error", "configuration", str(error))
        return
    yield Finding("ok", "configuration", "keys, values and named files are in order")
    for topic, look in (("model", _model), ("data", _data), ("log folder", places.log_folder), ("disk", _disk)):
        yield from _looked_at(topic, partial(look, config))


def _looked_at(topic: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what is found; what is raised is found, too."""
    try:
        yield from look()
    except KTOError as error:
        yield Finding("error", topic, str(error))
    except Exception as error:  # of packages that are not as they should be: the rest is still looked at
        yield Finding("error", topic, f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    """Compare what is installed with what this package asks for."""
    wrong = []
    for line in requires("nemo_kto") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} is {there}, where {wanted.specifier} is needed")
    for text in wrong:
        yield Finding("error", "versions", f"{text}. Install with the project's constraints.txt.")
    others = [text for text in untested() if not any(line.split()[0] == text.split()[0] for line in wrong)]
    for text in others:
        yield Finding("warning", "versions", f"{text}. It may work; docs/versions.md says what was tried.")
    for name in TESTED:
        if not any(text.split()[0] == name for text in (*wrong, *others)):
            yield Finding("ok", "versions", f"{name} {version(name)}")
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.normalization") is None:
        yield Finding("error", "versions", "the package apex is not NVIDIA's, but a web toolkit. Uninstall it.")


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        yield Finding(
            "warning", "devices", f"no CUDA device is visible; runs are on the CPU, of which there are {cores} cores"
        )
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        text = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free"
        level: Level = "ok" if free > 0.9 * total else "warning"
        yield Finding(level, f"device {number}", text if level == "ok" else f"{text}: another process is using it")


def _model(config: KTOConfig) -> Iterator[Finding]:
    """Read configuration and names, shapes and places of the weights; check the layout."""
    accelerator = accelerator_of(config)
    tokenizer = load_tokenizer(tokenizer_folder(config), trust_remote_code=config.model.tokenizer.trust_remote_code)
    hf_config = hf_config_of(config, tokenizer)
    yield Finding("ok", "model", f"{hf_config.model_type}, {hf_config.num_hidden_layers} layers")
    if tokenizer.chat_template is None:
        yield Finding("warning", "tokenizer", "it has no chat template, so data must be strings")
    layout = layout_of(config, hf_config, accelerator)
    yield Finding("ok", "layout", f"{accelerator}, {layout}")
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        started = os.environ["WORLD_SIZE"]
        yield Finding(
            "error", "layout", f"{started} processes were started, the configuration means {layout.world_size}"
        )


def _disk(config: KTOConfig) -> Iterator[Finding]:
    tokenizer = load_tokenizer(tokenizer_folder(config), trust_remote_code=config.model.tokenizer.trust_remote_code)
    yield from places.disk(config, hf_config_of(config, tokenizer))


def _data(config: KTOConfig) -> Iterator[Finding]:
    """Read the first records of each entry, and make tokens of them."""
    data = config.model.data
    tokenizer = load_tokenizer(tokenizer_folder(config), trust_remote_code=config.model.tokenizer.trust_remote_code)
    model = model_folder(config)
    images = None if model is None else image_tokens(model)
    encoder = Encoder(tokenizer, tokenization_settings(data), images)
    for split in ("train", "validation"):
        for source in sources(data, getattr(data.data_prefix, split) or ()):
            records = itertools.chain.from_iterable(map(parse_chunk, read_chunks(source, _SAMPLE)))
            results = encoder.encode(list(itertools.islice(records, _SAMPLE)))
            yield from _of_records(
                f"{split} data", source.path, results, data.seq_length, skip=data.on_bad_record == "skip"
            )


def _of_records(
    topic: str, path: str, results: list[EncodedRecord | BadRecord], limit: int, *, skip: bool
) -> Iterator[Finding]:
    bad = [result for result in results if isinstance(result, BadRecord)]
    good = [result for result in results if isinstance(result, EncodedRecord)]
    if bad:
        text = f"{len(bad)} of the first {len(results)} records cannot be used, such as {bad[0]}"
        yield Finding("warning" if skip and good else "error", topic, text)
    if good:
        up = sum(one.desirable for one in good)
        yield Finding("ok", topic, f"{path}: {up} thumbs up and {len(good) - up} down among the first {len(results)}")
        if up in (0, len(good)):
            yield Finding("warning", topic, f"{path}: all of them are of one kind; KTO learns more from both")
        long = sum(len(one.prompt) + len(one.response) > limit for one in good)
        if long:
            yield Finding("warning", topic, f"{long} of them have more than model.data.seq_length={limit} tokens")
    notes = Counter(note.kind for one in good for note in one.notes)
    examples = {note.kind: note.example for one in reversed(good) for note in one.notes}
    for kind, count in notes.items():
        yield Finding("warning", topic, f"in {count} of them, {kind}. For example {examples[kind]}")

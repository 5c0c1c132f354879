"""`nemo-kto data check | convert | show`: feedback looked at before it is trained on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_kto.config.checks import check_bounds, check_data
from nemo_kto.config.folders import check_links
from nemo_kto.config.reader import build
from nemo_kto.config.schema import DataConfig, ModelConfig
from nemo_kto.data.batches.samples import Samples, read_samples
from nemo_kto.data.batches.statistics import DataStatistics, describe
from nemo_kto.data.reading.chunks import MAX_SHOWN, bad_records_error, parse_chunk, read_chunks
from nemo_kto.data.reading.json_strings import messages_in
from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, Image, image_kind
from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.store import Notes
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import ConfigError, DataError, KTOError
from nemo_kto.runs.records import image_tokens, sources, tokenization_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 1000
_ENDS = 4
"""Tokens with which responses end, of which the table shows the most frequent ones."""
_ALIKE = 4
"""Special tokens of one kind behind each other from which on they are counted, not shown."""
_MODEL_OPTIONS = ("seed", "global_batch_size")
"""Options that are keys of `model`, not of `model.data`."""


def _settings(options: argparse.Namespace) -> DataConfig:
    """Return `model.data` with what the options say of it.

    Raises:
        ConfigError: A value is impossible.
    """
    prefix, names = "--", {item.name for item in dataclasses.fields(DataConfig)}
    given = {prefix + name: value for name, value in vars(options).items() if name in names and value is not None}
    given[f"{prefix}fields"] = dict(map(_field, options.field))
    given[f"{prefix}labels"] = _labels(options.labels)
    try:
        data: DataConfig = build(DataConfig, given, prefix)
    except ConfigError as error:
        raise ConfigError(re.sub(r"^--\w+", lambda name: name[0].replace("_", "-"), str(error))) from error
    data.append_eod = not getattr(options, "no_append_eod", False)
    of_model = {f"model.{name}": getattr(options, name, None) for name in _MODEL_OPTIONS}
    check_bounds({"model.data.seq_length": data.seq_length, **of_model})
    check_data(data)
    return data


def _field(text: str) -> tuple[str, str]:
    name, separator, column = text.partition("=")
    if not separator:
        raise ConfigError(f"--field {text}: write NAME=COLUMN, such as response=answer.")
    return name, column


def _labels(texts: list[str]) -> dict[str, list[str]] | None:
    found: dict[str, list[str]] = {}
    for text in texts:
        kind, separator, words = text.partition("=")
        if not separator:
            raise ConfigError(f"--labels {text}: write KIND=WORDS, such as desirable=good,like.")
        found[kind] = found.get(kind, []) + words.split(",")
    return found or None


def _encoder(options: argparse.Namespace, data: DataConfig) -> Encoder:
    if options.tokenizer.is_dir():
        check_links(options.tokenizer)
    # a reader of somebody's own may need torch
    without_torch = options.own_process and data.reader is None and not options.trust_remote_code
    tokenizer = load_tokenizer(
        options.tokenizer, without_torch=without_torch, trust_remote_code=options.trust_remote_code
    )
    return Encoder(tokenizer, tokenization_settings(data), image_tokens(options.tokenizer))


def _seed(options: argparse.Namespace) -> int:
    return ModelConfig().seed if options.seed is None else options.seed


def _records(found: list[Source]) -> Iterator[FeedbackRecord | BadRecord]:
    for source in found:
        for chunk in read_chunks(source, _ROWS):
            yield from parse_chunk(chunk)


def check(options: argparse.Namespace) -> None:
    """Print what is in some feedback; exit code 1 if a record cannot be used."""
    data = _settings(options)
    data.seq_length = min(data.seq_length, _max_positions(options.tokenizer) or data.seq_length)
    try:
        with tempfile.TemporaryDirectory(prefix="nemo_kto-") as temporary:
            encoder = _encoder(options, data)
            samples = _tokenized(options, data, encoder, Path(data.cache_dir or temporary))
            bad = [record for store in samples.stores for record in store.bad_records(MAX_SHOWN)][:MAX_SHOWN]
            if len(samples):
                found = describe(samples, global_batch_size=options.global_batch_size, seed=_seed(options))
            else:
                found = None
            notes = samples.notes
            ends = _ends(samples, encoder.tokenizer)
    except KTOError as error:
        if not options.json:
            raise
        print(json.dumps({"ok": False, "error": str(error)}))
        raise SystemExit(1) from error
    ok = found is not None and not samples.num_bad
    if options.json:
        report = {
            "ok": ok,
            "statistics": found and dataclasses.asdict(found),
            "bad_records": [record.row() for record in bad],
            "last_tokens": ends,
            "notes": [{"kind": kind, "records": n, "example": example} for kind, (n, example) in notes.items()],
        }
        print(json.dumps(report))
    else:
        _print_report(found, samples, bad, ends, limit=data.seq_length)
    if not ok:
        raise SystemExit(1)


def _tokenized(options: argparse.Namespace, data: DataConfig, encoder: Encoder, cache_dir: Path) -> Samples:
    return read_samples(
        sources(data, options.files, reader_key="--reader"),
        partial(TokenCache(cache_dir, encoder).tokens_of, skip_bad=True),
        max_length=data.seq_length,
        overlong=data.overlong,
        bos_token_id=encoder.tokenizer.bos_token_id,
        seed=_seed(options),
    )


def _max_positions(folder: Path) -> int | None:
    """Return the longest document of the model in a folder, in tokens; None if there is only a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    positions = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return positions if isinstance(positions, int) else None


def _ends(samples: Samples, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the last tokens of responses and how many end with each, the most frequent first."""
    counts = Counter(samples.last_tokens.tolist())
    return {str(tokenizer.convert_ids_to_tokens(token)): count for token, count in counts.most_common()}


def _print_report(
    found: DataStatistics | None, samples: Samples, bad: list[BadRecord], ends: dict[str, int], *, limit: int
) -> None:
    console = Console()
    if found is None:
        console.print("No sample is left to train on.", style="bold red")
    else:
        console.print(_table(found, limit, ends))
    if samples.notes:
        console.print(_notes_table(samples.notes))
    if not bad:
        return
    count = "1 bad record" if samples.num_bad == 1 else f"{samples.num_bad:,} bad records"
    shown = "" if samples.num_bad == len(bad) else f", the first {len(bad)} of them"
    console.print(f"{count}{shown}:", style="bold red")
    for record in bad:
        console.print(f"  {record}", markup=False, highlight=False, soft_wrap=True)


def _notes_table(notes: Notes) -> Table:
    table = Table("records", "what to know about them", "for example", title="Notes", title_justify="left")
    for kind, (count, example) in notes.items():
        table.add_row(f"{count:,}", Text(kind), Text(example), style="yellow")
    return table


def _table(found: DataStatistics, limit: int, ends: dict[str, int]) -> Table:
    table = Table(show_header=False, title="Feedback", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    size = found.global_batch_size
    table.add_row("samples", f"{found.samples:,}")
    table.add_row("desirable / undesirable", f"{found.desirable:,} / {found.undesirable:,}")
    empty = f", {found.empty_responses:,} with an empty response" if found.empty_responses else ""
    table.add_row("bad records", f"{found.bad:,}{empty}", style=_red(found.bad))
    table.add_row(f"over {limit:,} tokens", f"{found.overlong:,} dropped, {found.truncated:,} cut")
    table.add_row("prompt tokens", _spread(found.prompt_tokens))
    table.add_row("response tokens", _spread(found.response_tokens))
    shown = [f"{token} ({count:,})" for token, count in itertools.islice(ends.items(), _ENDS)]
    table.add_row("responses end with", Text(", ".join(shown + ["..."] * (len(ends) > _ENDS))))
    table.add_section()
    table.add_row("duplicates", f"{found.duplicates:,}")
    table.add_row("answers with both labels", f"{found.conflicts:,}", style=_yellow(found.conflicts))
    table.add_row(
        "different prompts",
        f"{found.prompts:,}, {found.shared_prompts:,} of them with several samples (at most {found.largest_group:,})",
    )
    table.add_row("merges of prompt and response", f"{found.boundary_merges:,}")
    table.add_section()
    table.add_row("tokens in an epoch", f"{found.tokens:,}")
    if found.kl_tokens is None:
        table.add_row(f"in batches of {size}", "too few samples", style="yellow")
    else:
        table.add_row(f"KL pairs, batches of {size}", f"{found.kl_tokens:,} tokens more")
        table.add_row("KL pairs with their own prompt", f"{found.kl_meetings:,}", style=_yellow(found.kl_meetings))
        table.add_row("padding", f"none; padded batches would be {found.padding:.0%} padding")
    table.add_section()
    table.add_row("model.global_batch_size", str(found.recommended_batch_size or "at least 8 samples are needed"))
    if found.recommended_weights is None:
        table.add_row("loss weights", "all samples are of one kind", style="yellow")
    else:
        for name, weight in zip(("desirable", "undesirable"), found.recommended_weights, strict=True):
            table.add_row(f"model.kto.{name}_loss_weight", f"{weight:.4g}")
    return table


def _spread(tokens: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in tokens.items())


def _red(count: int) -> str | None:
    return "red" if count else None


def _yellow(count: int | None) -> str | None:
    return "yellow" if count else None


def convert(options: argparse.Namespace) -> None:
    """Write feedback as JSON Lines."""
    data, output = _settings(options), options.output
    if output.exists():
        raise ConfigError(f"{output} exists. Name another file, or remove it.")
    unfinished = output.with_name(f"{output.name}.partial")
    bad: list[BadRecord] = []
    written = spelling = 0
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for record in _of_one_kind(_records(sources(data, options.files, reader_key="--reader"))):
                if isinstance(record, BadRecord):
                    bad.append(record)
                    if data.on_bad_record == "error" and len(bad) > MAX_SHOWN:
                        break
                    continue
                spelling += _spells_messages(record)
                file.write(json.dumps(record.row(), ensure_ascii=False) + "\n")
                written += 1
        if bad and data.on_bad_record == "error":
            raise DataError(str(bad_records_error(bad)).replace("model.data.on_bad_record=", "--on-bad-record "))
        unfinished.rename(output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}).") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
    for one in bad:
        print(f"skipped: {one}", file=sys.stderr)
    if spelling:
        what = f"{spelling} records have text that spells messages as JSON"
        print(f"{what}; read the file with model.data.json_strings=text.", file=sys.stderr)
    print(f"Wrote {written} records to {output}" + (f", skipped {len(bad)}" if bad else ""))


def _of_one_kind(records: Iterator[FeedbackRecord | BadRecord]) -> Iterator[FeedbackRecord | BadRecord]:
    """Yield records; raise a DataError where strings and messages would come into one file."""
    kinds = set()
    for record in records:
        if isinstance(record, FeedbackRecord):
            kinds.add(type(record.prompt))
            if len(kinds) > 1:
                raise DataError(
                    f"{record.place}: some records are strings and others messages, and a file with both could be "
                    "read in two ways. --prompt-template chat makes messages of all strings."
                )
        yield record


def _spells_messages(record: FeedbackRecord) -> bool:
    texts = [text for text in (record.prompt, record.response) if isinstance(text, str)]
    return any(messages_in(text) is not None for text in texts)


def show(options: argparse.Namespace) -> None:
    """Print a record as the model will see it."""
    if options.number < 1:
        raise ConfigError(f"{options.number}: records are counted from 1.")
    data = _settings(options)
    encoder = _encoder(options, data)
    record = next(
        itertools.islice(_records(sources(data, options.files, reader_key="--reader")), options.number - 1, None), None
    )
    if record is None:
        raise DataError(f"There is no record {options.number}; the data ends before.")
    (result,) = encoder.encode([record])
    if isinstance(result, BadRecord):
        raise DataError(str(result))
    assert isinstance(record, FeedbackRecord), record
    colour = "green" if result.desirable else "red"
    console = Console(highlight=False)
    console.print(f"{record.place}, {'desirable' if result.desirable else 'undesirable'}", style="bold", markup=False)
    for number, image in enumerate(record.images, 1):
        console.print(f"image {number}: {_described(image)}", markup=False, soft_wrap=True)
    for name, tokens, style in (("prompt", result.prompt, "cyan"), ("response", result.response, colour)):
        console.rule(f"{name}, {len(tokens)} tokens", style=style, align="left")
        console.print(_visible(tokens, encoder.tokenizer, style), soft_wrap=True)
    console.print(
        f"The response ends with {encoder.tokenizer.convert_ids_to_tokens(result.response[-1])}", markup=False
    )
    for note in result.notes:
        console.print(f"Note: {note.kind}, {note.example}", style="yellow", markup=False, soft_wrap=True)


def _described(image: Image) -> str:
    return image.file or f"{len(image.data or b''):,} bytes ({image_kind(image.data or b'') or 'unknown kind'})"


def _visible(tokens: list[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    """Return tokens as text, special ones set off and line breaks marked."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = Text()
    for is_special, group in itertools.groupby(tokens, key=lambda token: token in special):
        if is_special:
            for token, alike in itertools.groupby(group):
                count = len([*alike])
                shown = str(tokenizer.convert_ids_to_tokens(token))
                # one image is hundreds of the same token
                text.append(shown * count if count < _ALIKE else f"{shown} x {count:,}", style="reverse")
        else:
            decoded = tokenizer.decode(list(group), clean_up_tokenization_spaces=False)
            text.append(str(decoded).replace("\n", "↵\n"), style=style)
    return text

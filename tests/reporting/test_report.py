"""`nemo-kto report`: every series is drawn, the tables are right, and the page is safe and complete in itself."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_kto import cli, errors
from nemo_kto.errors import DataError
from nemo_kto.reporting.data_plots import draw_lengths, draw_sources
from nemo_kto.reporting.panels import PANELS, panels_of
from nemo_kto.reporting.plots import caption, draw_panel, shorten, smooth
from nemo_kto.reporting.reading import Run, read_runs
from nemo_kto.reporting.report import write_report
from nemo_kto.reporting.tables import differences, duration, number
from tests.waiting import HANG

START = 1_800_000_000.0
"""Time of step 0 (2027-01-15 08:00 UTC); a step takes two seconds."""

Points = dict[int, float]


def log(folder: Path, series: dict[str, Points], *, delay: float = 0.0, suffix: str = "") -> Path:
    """Write one event file; return the folder. `delay` moves the time at which everything was written."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for tag, points in series.items():
        for step, value in points.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=START + delay + 2 * step, step=step, summary=summary))
    writer.close()
    return folder


def describe(folder: Path, **info: Any) -> None:
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")


def generate(folder: Path, *rows: dict[str, Any] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "generations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(folder: Path) -> Run:
    return read_runs([folder])[0]


def points_of(run: Run, tag: str) -> Points:
    series = run.series[tag]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


class Page(HTMLParser):
    """What is on a page: rows of its tables, its headings, texts in <code> and <pre>, its tags and attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {name: [] for name in ("title", "h2", "h3", "h4", "code", "pre", "p")}
        self._cell = False
        self._inside: str | None = None
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        elif tag in self.texts:
            self.texts[tag].append("")
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._inside = None if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data
        elif self._inside:
            self.texts[self._inside][-1] += data

    def row(self, heading: str) -> list[str]:
        """The cells of the first row with this heading."""
        return next(row[1:] for row in self.rows if row[:1] == [heading])


KNOWN_TAGS = [f"{split}/{name}" for split in ("train", "val") for name in ("loss", "kl", "rewards/chosen")]
OTHER_TAGS = ["train/another", "train/a b", "train/a_b", "own", "val/<i>&", "validation/loss"]
DATA = {
    "sources": [
        {"path": "data/one.jsonl", "samples": 30, "desirable": 10},
        {"path": "data/$x$_{\\_数据.jsonl", "samples": 40, "desirable": 25},
    ],
    "samples": 70,
    "desirable": 35,
    "undesirable": 35,
    "overlong": 3,
    "truncated": 2,
    "bad": 1,
    "prompt_lengths": {"edges": [0, 8, 16, 24], "desirable": [5, 20, 10], "undesirable": [30, 5, 0]},
    "response_lengths": {"edges": [1, 10, 100], "desirable": [5, 30], "undesirable": [30, 5]},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything a log folder can hold."""
    folder = tmp_path_factory.mktemp("full")
    series = {tag: {step: step / 8 for step in range(4)} for tag in KNOWN_TAGS + OTHER_TAGS}
    series["train/loss"] = {step: 0.5 - step / 64 for step in range(20)}
    series["val/loss"] = {9: 0.375, 19: 0.25}
    series["train/consumed_samples"] = {step: 32.0 * (step + 1) for step in range(20)}
    series["train/step_time"] = {0: 9.0, 1: 1.0, 2: 2.0}
    log(folder, series)
    describe(
        folder,
        name="<script>alert('name')</script>",
        started="2026-11-21T10:05:00+00:00",
        layout="2 processes: TP=2",
        accelerator="cpu",
        config={
            "model": {"seed": 7, "global_batch_size": 64, "data": {"format": "<b>"}},
            "future": {"key": [1, None]},
        },
        versions={"nemo_kto": "0.1.0", "torch": "2.13.0"},
        data={"train": DATA, "validation": None},
    )
    answers = [
        {
            "step": step,
            "prompt": "Say <script>alert(1)</script> & go",
            "policy": f"p{step}",
            "reference": "<img src=x>",
        }
        for step in (0, 4, 9, 14, 19)
    ]
    generate(folder, *answers, {"step": 19, "prompt": "Q", "policy": "A", "reference": None}, '{"step": 20, "pro')
    return write_report([folder], folder / "report")


def test_every_series_is_named_on_the_page_and_drawn(full: Path) -> None:
    run = read(full.parent.parent)
    tags = {*KNOWN_TAGS, *OTHER_TAGS, "train/consumed_samples", "train/step_time"}
    assert set(run.series) == tags
    assert set(Page(full).texts["code"]) == tags
    assert {tag for tag in tags if Page(full).row(tag)} == tags  # in the table of all series
    drawn = {}
    for panel, lines in panels_of([run]):
        for line in draw_panel(panel, lines).axes[0].get_lines():
            drawn[line.get_gid()] = dict(zip(*line.get_data(), strict=True))
    assert drawn == {tag: points_of(run, tag) for tag in tags}


def test_unknown_series_are_in_their_own_section(full: Path) -> None:
    run = read(full.parent.parent)
    others = [line.series.tag for panel, lines in panels_of([run]) if panel.section == "Other" for line in lines]
    assert sorted(others) == sorted(OTHER_TAGS)
    assert "Other" in Page(full).texts["h2"]
    # names that would become the same file
    assert {"other_a_b.png", "other_a_b_2.png"} <= {file.name for file in full.parent.glob("*.png")}


def test_summary(full: Path) -> None:
    page = Page(full)
    # training loss falls by 1/64 a step: 0.5 - 19/64 at the end, and 0.5 - 14.5/64 is the mean of steps 10 to 19
    assert page.row("Loss") == ["0.2031", "0.2734", "0.25"]
    assert page.row("Rewards, desirable") == ["–", "–", "–"]  # the last steps, and the last validation, have none
    assert page.row("another") == ["0.375", "0.1875", "–"]  # mean of 0, 1, 2, 3 eighths: nobody knows when it is due
    assert page.row("Steps") == ["20"] and page.row("Samples seen") == ["640"]
    assert page.row("Time, pauses left out") == ["38 s"]  # from step 0 to step 19, two seconds each
    assert page.row("Seconds per step, median") == ["2"]
    assert page.row("Started") == ["2026-11-21 10:05 UTC"]
    assert page.row("Layout") == ["2 processes: TP=2"]
    assert page.row("train/loss") == ["20", "0.5", "0.2031", "0.5", "0.2031"]  # points, first, lowest, highest, last


def test_configuration_puts_what_was_chosen_first(full: Path) -> None:
    page = Page(full)
    assert page.row("model.seed") == ["7", "1234"]  # value, default
    assert page.row("future.key") == ["[1, null]", "–"]
    assert page.row("model.global_batch_size") == ["64"]  # in the table of the keys at their default
    headings = [row[0] for row in page.rows if row]
    assert headings.index("model.seed") < headings.index("model.global_batch_size")
    assert page.row("torch") == ["2.13.0"]


def test_generations_latest_step_first(full: Path) -> None:
    page = Page(full)
    assert [heading for heading in page.texts["h3"] if heading.startswith("After")] == [
        "After 19 steps",
        "After 9 steps",
        "After 0 steps",
    ]
    assert page.texts["pre"][:5] == ["Say <script>alert(1)</script> & go", "p19", "<img src=x>", "Q", "A"]
    assert page.texts["h4"][:5] == ["Prompt", "policy", "reference", "Prompt", "policy"]
    assert any("could not be read and are left out: 1." in text for text in page.texts["p"])


def test_what_comes_from_data_is_escaped(full: Path) -> None:
    page, source = Page(full), full.read_text(encoding="utf-8")
    assert "<script" not in source and "<img src=x" not in source and "<b>" not in source and "<i>" not in source
    assert html.escape("<script>alert(1)</script> & go") in source
    assert page.texts["title"] == ["<script>alert('name')</script>"]
    assert page.row("model.data.format") == ["<b>", "auto"]


def test_names_of_files_are_escaped(tmp_path: Path) -> None:
    """Also those with bytes that are no text, and of folders."""
    name = '<img src=y> & $x$ "two\nlines" \udcff.jsonl'
    folder = log(tmp_path / "<i>run</i>", {"train/loss": {0: 0.5, 1: 0.4}})
    sources = [{"path": f"/data/{name}", "samples": 3, "desirable": 1}]
    describe(folder, name="run", data={"train": {**DATA, "sources": sources}, "validation": None})
    page = Page(write_report([folder], tmp_path / "report"))
    assert not any(tag == "i" or attributes.get("src") == "y" for tag, attributes in page.tags)
    shown = f"/data/{name}".replace("\udcff", "\\udcff")
    assert any(shown in row for row in page.rows)
    assert page.row("Log folder") == [str(folder)]


def test_page_loads_nothing(full: Path) -> None:
    source = full.read_text(encoding="utf-8")
    loaded = [attributes["src"] for _, attributes in Page(full).tags if "src" in attributes]
    assert loaded and all(address and address.startswith("data:image/png;base64,") for address in loaded)
    links = [attributes["href"] or "" for _, attributes in Page(full).tags if "href" in attributes]
    anchors = [attributes.get("id") for _, attributes in Page(full).tags]
    assert links and all(link.startswith("#") and link[1:] in anchors for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in Page(full).tags}
    assert not re.search(r"https?:|url\(|@import", source)


def test_pictures_are_files_and_on_the_page(full: Path) -> None:
    files = sorted(full.parent.glob("*.png"))
    # loss, KL, rewards, step time, samples; others; lengths of prompts and responses and sources of the training data
    assert len(files) == 5 + 6 + 3
    embedded = [attributes["src"] or "" for tag, attributes in Page(full).tags if tag == "img"]
    assert {base64.b64decode(src.split(",")[1]) for src in embedded} == {file.read_bytes() for file in files}
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            assert picture.format == "PNG" and picture.width == 750 and 200 < picture.height < 900
            grey = np.asarray(picture.convert("L"))
        assert grey.max() == 255 and grey.min() < 64  # ink on white
        assert len(file.read_bytes()) < 60_000


def test_counts_of_the_data(full: Path) -> None:
    page = Page(full)
    assert page.row("overlong") == ["3"] and page.row("bad") == ["1"]
    assert page.row("data/one.jsonl") == ["train", "30", "10", "20"]
    bars = draw_sources("sources", DATA["sources"]).axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 25), (0, 10), (25, 15), (10, 20)]
    desirable, undesirable = draw_lengths("lengths", DATA["prompt_lengths"]).axes[0].patches
    assert desirable.get_data().values.tolist() == [5, 20, 10]
    assert undesirable.get_data().edges.tolist() == [0, 8, 16, 24]


def test_many_sources_share_a_bar() -> None:
    sources = [{"path": f"{n:02}", "samples": 100 - n, "desirable": 1} for n in range(17)]
    axes = draw_sources("sources", sources).axes[0]
    # 14 bars, then sources 14, 15 and 16 with 86 + 85 + 84 samples
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["13", "3 more sources"]
    assert (axes.patches[14].get_width(), axes.patches[29].get_width()) == (3, 252)


# reading


def test_parts_of_a_resumed_run_are_merged(tmp_path: Path) -> None:
    killed = {step: 1.0 for step in range(6)}
    log(tmp_path / "run_0", {"train/loss": killed, "train/early": {0: 5.0}})
    log(tmp_path / "run_1", {"train/loss": {step: 2.0 for step in range(4, 8)}}, delay=1000)
    log(tmp_path, {"train/loss": {7: 3.0, 8: 3.0}}, delay=2000, suffix=".b")
    log(tmp_path, {"val/loss": {8: 4.0}}, delay=2000, suffix=".a")
    run = read(tmp_path)
    assert points_of(run, "train/loss") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 8: 3}
    assert points_of(run, "train/early") == {0: 5} and points_of(run, "val/loss") == {8: 4}
    assert run.steps == 9
    assert run.seconds == 10 + 6 + 2  # without the pauses of about 1000 s
    assert run.started.timestamp() == START


def test_the_later_written_value_counts_wherever_it_lies(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {0: 1.0, 1: 1.0}}, delay=0)
    log(tmp_path / "run_0", {"train/loss": {1: 2.0}}, delay=1000)
    assert points_of(read(tmp_path), "train/loss") == {0: 1, 1: 2}


def test_what_training_wrote_is_found_in_earlier_parts(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {0: 0.5}})
    for part in ("run_2", "run_10"):
        (tmp_path / part).mkdir()
        describe(tmp_path / part, name=part)
    generate(
        tmp_path / "run_2", {"step": 1, "prompt": "a", "policy": "old"}, {"step": 0, "prompt": "a", "policy": "x"}
    )
    generate(tmp_path, {"step": 1, "prompt": "a", "policy": "new"}, {"step": 1, "prompt": "b", "policy": "y"}, "[]")
    run = read(tmp_path)
    assert run.name == "run_10"
    assert sorted((one.step, one.prompt, one.policy) for one in run.generations) == [
        (0, "a", "x"),
        (1, "a", "new"),
        (1, "b", "y"),
    ]
    assert run.unreadable_generations == 1


def test_a_cut_off_event_file_is_read_up_to_there(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {step: float(step) for step in range(10)}})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert points_of(read(tmp_path), "train/loss") == {step: step for step in range(9)}


def test_nothing_is_thinned_out(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {step: 0.5 for step in range(10_100)}})  # TensorBoard's own limit is 10,000
    assert read(tmp_path).series["train/loss"].steps.tolist() == list(range(10_100))


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        read_runs([tmp_path / "none"])
    with pytest.raises(DataError, match="exp_manager.create_tensorboard_logger=true"):
        read_runs([tmp_path])
    log(tmp_path / "empty", {})
    with pytest.raises(DataError, match="no numbers yet"):
        read_runs([tmp_path / "empty"])
    run = log(tmp_path / "run", {"train/loss": {0: 0.5}})
    with pytest.raises(DataError, match="given twice"):
        read_runs([run, tmp_path / "empty" / ".." / "run"])
    (run / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json is not valid JSON"):
        read_runs([run])
    (run / "run.json").unlink()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="--output"):
        write_report([run], tmp_path / "file")
    with pytest.raises(ValueError):
        write_report([], tmp_path)


def test_runs_are_told_apart_by_their_folders_where_their_names_are_equal(tmp_path: Path) -> None:
    folders = [log(tmp_path / name / "v1", {"train/loss": {0: 0.5}}) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/v1", "b/v1"]
    for folder in folders:
        describe(folder, name="megatron_gpt")
    assert [run.name for run in read_runs(folders)] == ["a/v1", "b/v1"]
    describe(folders[0], name="first")
    assert [run.name for run in read_runs(folders)] == ["first", "megatron_gpt"]


# several runs, and runs that hold little


def test_two_runs_are_compared(tmp_path: Path) -> None:
    folders = []
    for name, beta, loss in (("one", 0.1, 0.25), ("two", 0.5, 0.125)):
        folder = log(tmp_path / name, {"train/loss": {0: 0.5, 1: loss}, "val/loss": {1: loss * 2}})
        config = {"model": {"seed": 1234, "kto": {"ref_policy_kl_penalty": beta}}}
        describe(folder, name=name, config=config, versions={"torch": "2.13.0"}, data={"train": DATA})
        answer = {"step": 1, "prompt": "Q", "policy": f"of {name}", "reference": "R"}
        generate(folder, {**answer, "step": 0, "policy": "early"}, answer)
        folders.append(folder)
    page = Page(write_report(folders, tmp_path / "out"))
    assert page.row("Loss: validation, last") == ["0.5", "0.25"]
    assert page.row("Loss: train, mean of last 10") == ["0.375", "0.3125"]  # (0.5 + 0.25) / 2, (0.5 + 0.125) / 2
    assert differences(read_runs(folders)).rows == [["model.kto.ref_policy_kl_penalty", "0.1", "0.5"]]
    assert page.row("model.kto.ref_policy_kl_penalty") == ["0.1", "0.5"]
    assert page.texts["pre"] == ["Q", "of one", "of two", "R"]
    assert page.texts["h4"] == ["Prompt", "one, step 1", "two, step 1", "reference"]
    ((panel, lines),) = panels_of(read_runs(folders))
    axes = draw_panel(panel, lines).axes[0]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
    assert (
        len(axes.get_lines()) == 4 and len(looks) == 2
    )  # train and validation of a run look alike but for their size
    assert all(len({look[part] for look in looks}) == 2 for part in range(3))  # by more than the colour
    # the same data is drawn once: lengths of prompts and responses, sources
    assert len(list((tmp_path / "out").glob("data_*.png"))) == 3


def test_runs_without_configuration_are_mentioned(tmp_path: Path) -> None:
    folders = [log(tmp_path / name, {"train/loss": {0: 0.5}}) for name in ("one", "two")]
    describe(folders[0], config={"model": {"seed": 1}})
    page = Page(write_report(folders, tmp_path / "out"))
    assert any(text.startswith("Runs without a run.json") and "configuration: 1." in text for text in page.texts["p"])


def test_a_log_of_an_older_version_is_enough(tmp_path: Path) -> None:
    log(tmp_path, {"train/loss": {0: 0.5}})
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert page.texts["title"] == [tmp_path.name]
    assert not {"Data", "Generations", "Configuration", "Other"} & set(page.texts["h2"])
    assert page.row("Loss") == ["0.5", "0.5", "–"]
    assert page.row("Started") == ["2027-01-15 08:00 UTC"]


# drawing


def draw(folder: Path, points: Points, tag: str = "train/loss") -> tuple[dict[str | None, Any], str, Any]:
    """Return (gid -> line, caption, axes) of the panel of a single series."""
    ((panel, lines),) = panels_of([read(log(folder, {tag: points}))])
    axes = draw_panel(panel, lines).axes[0]
    return {line.get_gid(): line for line in axes.get_lines()}, caption(panel, lines), axes


def test_smooth() -> None:
    # at the ends, the mean of the two values that there are
    np.testing.assert_allclose(smooth(np.array([0.0, 3, 0, 3, 0]), 3), [1.5, 1, 2, 1, 1.5])


def test_only_noisy_series_are_smoothed(tmp_path: Path) -> None:
    lines, text, _ = draw(tmp_path / "noisy", {step: float(step % 2) for step in range(100)})
    raw, smoothed = lines["train/loss raw"], lines["train/loss"]
    assert raw.get_ydata().tolist() == [0, 1] * 50 and raw.get_alpha() < 1
    assert smoothed.get_ydata()[50] == pytest.approx(0.4)  # of steps 48 to 52, two are 1
    assert "mean of the 5 logged steps" in text
    ramp = {step: min(step, 10) * (100 - step) * 1e-6 for step in range(100)}
    lines, text, _ = draw(tmp_path / "lr", ramp, "train/lr")
    assert set(lines) == {"train/lr"} and text == ""


def test_values_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    lines, text, _ = draw(tmp_path, {0: 0.5, 1: math.nan, 2: 0.25, 3: math.inf})
    np.testing.assert_equal(lines["train/loss"].get_ydata(), [0.5, math.nan, 0.25, math.nan])  # no line over them
    crosses = next(line for line in lines.values() if line.get_marker() == "x")
    assert crosses.get_xdata().tolist() == [1, 3]
    assert "2 values that are not finite" in text
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert page.row("Loss") == ["inf", "nan", "–"]
    assert page.row("train/loss") == ["4", "0.5", "0.25", "0.5", "inf"]


def test_a_series_without_any_finite_value_is_drawn(tmp_path: Path) -> None:
    log(tmp_path, {"train/grad_norm": {0: math.nan}, "train/loss": {step: math.nan for step in range(60)}})
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert page.row("train/grad_norm") == ["1", "nan", "–", "–", "nan"]


@pytest.mark.parametrize("validation", [False, True])
def test_a_line_is_interrupted_where_a_step_has_no_value(tmp_path: Path, validation: bool) -> None:
    """Steps 0 to 79, or every tenth; a class is in those whose number modulo 5 is below 2, and in step 23."""
    split, every = ("val", 10) if validation else ("train", 1)
    steps = range(0, 80 * every, every)
    with_class = [step for step in steps if step // every % 5 < 2 or step == 23 * every]
    rejected = {step: step * 1e-3 for step in with_class}
    folder = log(
        tmp_path,
        {f"{split}/loss": dict.fromkeys(steps, 0.5), f"{split}/rewards/rejected": rejected, "train/own": {0: 1, 9: 2}},
    )
    log(folder, {"train/lr": dict.fromkeys(range(80), 1e-3)}, suffix=".other")
    panels = {panel.title: (panel, lines) for panel, lines in panels_of([read(folder)])}
    panel, (line,) = panels["Rewards"]
    drawn = {line.get_gid(): line for line in draw_panel(panel, [line]).axes[0].get_lines()}
    curve = drawn[f"{split}/rewards/rejected"]
    last = with_class[-1]
    assert curve.get_xdata().tolist() == [step for step in steps if step <= last]
    expected = [rejected.get(step, math.nan) for step in steps if step <= last]
    np.testing.assert_allclose(curve.get_ydata(), expected)
    assert "Gaps: steps without a value" in caption(panel, [line])
    # validations have markers anyway; a single training step would be a line without length
    alone = drawn.get(f"{split}/rewards/rejected alone")
    assert validation or (alone is not None and alone.get_xdata().tolist() == [23])
    for title in ("Loss", "Learning rate", "own"):
        panel, (line, *_) = panels[title]
        assert not line.missing.size and "Gaps" not in caption(panel, [line]), title


def test_a_smoothed_line_is_interrupted_too(tmp_path: Path) -> None:
    present = [step for step in range(120) if step % 4]
    values = {step: float(step % 2) for step in present}
    folder = log(tmp_path, {"train/loss": dict.fromkeys(range(120), 0.5), "train/rewards/margins": values})
    ((_, lines),) = [found for found in panels_of([read(folder)]) if found[0].title == "Reward margin"]
    drawn = {line.get_gid(): line for line in draw_panel(PANELS[4], lines).axes[0].get_lines()}
    for gid in ("train/rewards/margins raw", "train/rewards/margins"):
        assert np.isnan(drawn[gid].get_ydata()).tolist() == [step % 4 == 0 for step in range(1, 120)]
    # steps 49, 50, 51 and what is around them: 0 1 [1] 0 1, 1 1 [0] 1 1, 1 0 [1] 1 0
    assert drawn["train/rewards/margins"].get_ydata()[48:51].tolist() == pytest.approx([0.6, 0.8, 0.6])


def test_final_numbers_are_of_the_last_steps(tmp_path: Path) -> None:
    log(
        tmp_path,
        {
            "train/loss": dict.fromkeys(range(20), 0.5),
            "train/rewards/chosen": {0: 9.0, 10: 1.0, 18: 2.0},  # not in the last step, in two of the last ten
            "train/rewards/rejected": {0: 9.0, 19: 3.0},
            "val/loss": {9: 0.5, 19: 0.5},
            "val/rewards/chosen": {9: 4.0},
            "val/rewards/rejected": {9: 4.0, 19: 5.0},
        },
    )
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert page.row("Rewards, desirable") == ["–", "1.5", "–"]
    assert page.row("Rewards, undesirable") == ["3", "3", "5"]


def test_a_single_point_is_a_marker(tmp_path: Path) -> None:
    lines, _, axes = draw(tmp_path, {7: 0.5})
    assert lines["train/loss"].get_marker() not in (None, "", "None")
    assert axes.get_xticks().tolist() == [7]


@pytest.mark.parametrize(
    ("points", "scale"),
    [({0: 100.0, 1: 0.1}, "log"), ({0: 2.0, 1: 1.0}, "linear"), ({0: 100.0, 1: 0.0}, "linear")],
)
def test_gradient_norm_over_decades_is_logarithmic(tmp_path: Path, points: Points, scale: str) -> None:
    _, text, axes = draw(tmp_path, points, "train/grad_norm")
    assert axes.get_yscale() == scale and ("Logarithmic" in text) == (scale == "log")


def test_labels_can_be_drawn() -> None:
    assert shorten("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"
    assert shorten("two\n lines") == "two lines"
    assert shorten("$x$") == r"\$x\$"  # no formula
    assert shorten("数x") == "?x"  # not in the font


def test_numbers_as_people_read_them() -> None:
    values = (None, math.nan, 0.0, 0.123456, -1.5, 12345.6, 6.4e-7, 3e12)
    assert [*map(number, values)] == ["–", "nan", "0", "0.1235", "-1.5", "12,346", "6.4e-07", "3.000e+12"]
    assert [*map(duration, (0, 59.6, 61, 3600, 90061))] == ["0 s", "1 min", "1 min 1 s", "1 h", "1 d 1 h"]


# the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(errors, "_leave", leave)  # a real one ends this process
    folders = [str(log(tmp_path / name, {"train/loss": {0: 0.5}})) for name in ("one", "two")]
    cli.main(["report", folders[0]])
    assert capsys.readouterr().out == f"Wrote {folders[0]}/report/report.html\n"
    cli.main(["report", *folders, "-o", str(tmp_path / "both")])
    assert (tmp_path / "both" / "loss.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["report", *folders])
    assert "--output" in capsys.readouterr().err


def test_a_folder_without_events_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "nemo_kto.cli", "report", str(tmp_path)]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=HANG)
    assert ended.returncode == 1 and ended.stdout == ""
    assert (
        ended.stderr.startswith(f"error: {tmp_path.resolve()} holds no event files") and ended.stderr.count("\n") == 1
    )


def test_no_heavy_package_is_imported() -> None:
    program = "import sys, nemo_kto.reporting.report; print(sorted(sys.modules))"
    arguments = [sys.executable, "-c", program]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=HANG).stdout
    assert "'matplotlib'" in shown
    assert not [name for name in ("torch", "megatron", "nemo", "lightning", "transformers") if f"'{name}'" in shown]
    assert "matplotlib.pyplot" not in shown  # its figures are global

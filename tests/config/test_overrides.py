"""What people write on the command line arrives as they mean it, or they are shown how to write it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from nemo_kto.config.compose import load_config
from nemo_kto.config.overrides import quoted, readable
from nemo_kto.errors import ConfigError

TRAIN = "model.data.data_prefix.train"
NAMES = [
    "a=b.jsonl",
    "two words.jsonl",
    "it's.jsonl",
    'say "hi".jsonl',
    "a,b.jsonl",
    "a[1].jsonl",
    "[a].jsonl",
    "[a]",
    "{a}",
    "f(1).jsonl",
    "ünïcødé 日本語 😀.jsonl",
    "50% #1; a&b <x> !.jsonl",
    "back\\slash\\.jsonl",
    "ends in \\",
    " spaces ",
    "tab\tand\nline.jsonl",
    "${HOME}.jsonl",
    "a: b",
    "~x",
    "2024",
    "1e5",
    "true",
    "-3",
]
"""Names of files; each exists."""


def read(override: str) -> object:
    """Return the value that Hydra reads of an override."""
    return OverridesParser.create().parse_override(readable(override)).value()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_need_no_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for path in (name, str(tmp_path / name)):
        meant = path.replace("${", "\\${")  # as OmegaConf wants what refers to no other key
        assert read(f"{TRAIN}={path}") == read(f"exp_manager.explicit_log_dir={path}") == meant


def test_they_reach_the_configuration(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("${HOME}, a=[b].jsonl", "it's {ü}\\")]
    for file in files:
        file.touch()
    config = load_config([f"{TRAIN}={files[0]}", f"export.folder={files[1]}"])
    assert config.model.data.data_prefix.train == [str(files[0])]
    assert config.export.folder == str(files[1])


def test_a_list_of_files_needs_none_either(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a=b.jsonl", "it's (1).jsonl")]
    for file in files:
        Path(file).touch()
    assert load_config([f"{TRAIN}=[{files[0]}, {files[1]}]"]).model.data.data_prefix.train == files


@pytest.mark.parametrize("name", ["a=b.jsonl", "ü.jsonl", "no[1]*.jsonl", "it's"])
def test_nor_do_names_of_files_that_are_not_there_yet(name: str) -> None:
    """A log folder is made, and a pattern is no name."""
    assert load_config([f"exp_manager.explicit_log_dir={name}"]).exp_manager.explicit_log_dir == name
    assert load_config([f"{TRAIN}={name}"]).model.data.data_prefix.train == [name]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("exp_manager.name='a b'", "name", "a b"),
        ("exp_manager.name=a b", "name", "a b"),
        ("exp_manager.name=007", "name", "007"),
        ("exp_manager.name=7", "name", "7"),
        ("exp_manager.explicit_log_dir=null", "explicit_log_dir", None),
        ("+exp_manager.name=x=y", "name", "x=y"),
        (
            "exp_manager.wandb_logger_kwargs={project: a, name: b}",
            "wandb_logger_kwargs",
            {"project": "a", "name": "b"},
        ),
    ],
)
def test_what_hydra_reads_as_meant_stays(override: str, key: str, value: object) -> None:
    assert getattr(load_config([override]).exp_manager, key) == value


def test_a_name_that_is_too_long_is_none() -> None:
    assert load_config([f"{TRAIN}=a={'b' * 5000}"]).model.data.data_prefix.train == [f"a={'b' * 5000}"]


def test_other_things_are_not_taken_for_texts() -> None:
    assert readable("model.optim.lr=1e-5") == "++model.optim.lr=1e-5"
    assert readable(f"{TRAIN}={{path: a, weight: 2}}") == f"++{TRAIN}={{path: a, weight: 2}}"
    escaped = r"model.peft.lora_tuning.rank_pattern={layers.\[12\].*: 3}"
    assert load_config([escaped]).model.peft.lora_tuning.rank_pattern == {"layers.[12].*": 3}
    assert readable("model.seed=1,2", sweeps=True) == "++model.seed=1,2"
    assert readable("exp_manager.name=${model.seed}") == "++exp_manager.name=${model.seed}"
    assert load_config(["exp_manager.name=run-${model.seed}"]).exp_manager.name == "run-1234"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (f"{TRAIN}=[a=b.jsonl,c]", ["[a=b.jsonl,c] cannot be read", f"\"{TRAIN}=['a=b.jsonl','c']\""]),
        (f"{TRAIN}={{path: a=b}}", ["cannot be read", f"\"{TRAIN}={{path: 'a=b, c.jsonl'}}\""]),
        (
            "model.peft.lora_tuning.rank_pattern={layers.[12].*: 3}",
            ["cannot be read", "in front of a colon takes no quotes, but a backslash"],
        ),
        (f"{TRAIN}=a.jsonl,b.jsonl", [f"\"{TRAIN}='a.jsonl,b.jsonl'\"", f'"{TRAIN}=[a.jsonl,b.jsonl]"', "--multirun"]),
        ("exp_manager.name=a,b", ["\"exp_manager.name='a,b'\"", "several runs need --multirun"]),
        ("model.optim.lr=1e-5,1e-6", ["model.optim.lr=1e-5,1e-6 has commas", "--multirun"]),
        ("model.optim.lr=a=b", ["model.optim.lr=a=b cannot be read", "\"model.optim.lr='a=b'\""]),
    ],
)
def test_what_cannot_be_read_is_shown_as_it_is_to_be_written(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    for part in parts:
        assert part in str(caught.value), caught.value


@pytest.mark.parametrize("override", [f"{TRAIN}=[a=b.jsonl,c]", f"{TRAIN}=a,b", f'{TRAIN}=[say "hi",$x=1]'])
def test_what_is_shown_works_in_a_shell(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    shown = str(caught.value).split("shell: " if "shell: " in str(caught.value) else "commas is ", 1)[1]
    shown = shown.split("; several runs")[0].split(", several are ")[0]
    printed = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown) == [printed]
    assert load_config([printed]).model.data.data_prefix.train


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_whatever_is_quoted_is_read_as_it_is(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text

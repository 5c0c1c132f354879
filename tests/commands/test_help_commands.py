"""`nemo-kto config`, `completion` and `--help`: what they say is what the package does."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_kto import cli
from nemo_kto.commands.examples import EXAMPLES, commands_of
from nemo_kto.config.descriptions import below, descriptions
from nemo_kto.config.reader import leaf_types, leaf_values
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
KEYS = leaf_types(KTOConfig)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(list(arguments))
    return capsys.readouterr().out


# config


def test_a_key_is_explained_by_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "config", "model.kto.loss_reduction")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:2] == ["model.kto.loss_reduction", "takes sample_mean or class_mean; default sample_mean"]
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| `model.kto.loss_reduction`"))
    assert " ".join(lines[2:]) == row.split("|")[3].strip()


def test_every_key_is_there_and_links_are_readable() -> None:
    found = descriptions()
    assert set(found) == set(leaf_values(KTOConfig()))
    assert not [key for key, each in found.items() if "](" in each.meaning or not each.meaning]
    assert found["trainer.num_nodes"].meaning.endswith("else one. cluster.md")
    assert found["trainer.profile_steps"].takes == "an integer or a list of integers or null"


def test_a_section_is_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [each["key"] for each in json.loads(said(capsys, "config", "model.kto", "--json"))]
    assert keys == [key for key in descriptions() if key.startswith("model.kto.")]
    assert len(keys) == 17
    assert len(json.loads(said(capsys, "config", "--json"))) == len(KEYS)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("model.ktoo", "model.kto"), ("model.optim.rl", "model.optim.lr"), ("learning_rate", None), ("model.kto.", None)],
)
def test_an_unknown_key_is_refused_with_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError, match="Unknown configuration key") as refused:
        below(name)
    assert nearest is None or f"Did you mean {nearest}?" in str(refused.value)


# --help


def test_every_command_has_examples_that_it_takes() -> None:
    parser = cli._parser()
    assert set(EXAMPLES) == {name for name, _ in commands_of(parser)}
    for name, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[0] == "eval":
                words = shlex.split(words[1].removeprefix("$(").removesuffix(")"))
            words = words[words.index("nemo-kto") + 1 :]
            words = words[: words.index(">")] if ">" in words else words
            assert words[: len(name.split())] == name.split(), line
            assert not [key for key in keys_in(words) if key not in KEYS], line
            parser.parse_args([word for word in words if word != "--multirun"])


def keys_in(words: list[str]) -> list[str]:
    """Return the keys of KEY=VALUE; options have values with the sign too."""
    return [word.partition("=")[0] for word in words if "=" in word and "." in word.partition("=")[0]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_the_examples_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and f"usage: nemo-kto {name}" in text
    assert all(f"\n  {line}\n" in text for line in EXAMPLES[name])


# the commands of the scripts


def test_train_and_evaluate_are_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra gets all that follows, its own options among it."""
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli, "run_script", lambda command, overrides: called.append((command, list(overrides))))
    cli.main(["train", "--config-path", "/somewhere", "model.optim.lr=1e-6,2e-6", "--multirun"])
    cli.main(["evaluate"])
    assert called == [
        ("train", ["--config-path", "/somewhere", "model.optim.lr=1e-6,2e-6", "--multirun"]),
        ("evaluate", []),
    ]


# completion

TRY = """
source "$1"
shift
compopt() { printf 'compopt %s\\n' "$*"; }  # which can only be called while the shell completes
COMP_WORDS=("$@") COMP_CWORD=$(( $# - 1 )) COMPREPLY=()
_nemo_kto nemo-kto "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return shell -> the file of its script."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        with (folder / shell).open("w") as file, contextlib.redirect_stdout(file):
            cli.main(["completion", shell])
    return {shell: folder / shell for shell in ("bash", "zsh")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], {"train"}),
        (["data", ""], {"check", "convert", "show"}),
        (["train", "model.optim.sched.w"], {"model.optim.sched.warmup_steps=", "compopt -o nospace"}),
        # as bash cuts it
        (["train", "trainer.accelerator", "="], {"auto", "cpu", "gpu"}),
        (["evaluate", "a.b", "=", "c", "trainer.kto.on_nan", "=", "s"], {"skip_step"}),
        (["cache-reference", "trainer.deterministic", "=", ""], {"true", "false"}),
        (["doctor", "model.transformer_impl", "=", "lo"], {"local"}),
        (["train", "pretrained_checkpoint.restore_from_path", "=", "setup"], {"setup.py"}),
        (["train", "recipe", "=", "llama3_8b_"], {"llama3_8b_lora"}),
        (["plan", "reci"], {"recipe=", "compopt -o nospace"}),
        (["config", "model.kto.reference.sync_m"], {"model.kto.reference.sync_mixup_alpha"}),
        (["export-hf", "--dtype", "int"], set()),
        (["export-hf", "--dtype", "b"], {"bfloat16"}),
        (["report", "LICEN"], {"LICENSE", "compopt -o filenames"}),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),  # the same in each process
)
def test_bash_completes(scripts: dict[str, Path], words: list[str], expected: set[str]) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", TRY, "bash", scripts["bash"], "nemo-kto", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    assert {line for line in done.stdout.splitlines() if line} - {"compopt +o filenames"} == expected, done.stderr


def test_the_values_of_each_key_that_takes_words_are_known(scripts: dict[str, Path]) -> None:
    for shell, script in scripts.items():
        text = script.read_text()
        for key, kind in KEYS.items():
            assert f"{key}=" in text, (shell, key)
            if ("Literal" in str(kind) and "list[" not in str(kind)) or kind is bool:
                assert f"    {key}) comp" in text, (shell, key)


def test_zsh_can_read_its_script(scripts: dict[str, Path]) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    done = subprocess.run([zsh, "-n", scripts["zsh"]], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, "")
    assert scripts["zsh"].read_text().startswith("#compdef nemo-kto\n")

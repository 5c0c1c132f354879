"""Whatever is wrong with what a user gives, the command ends with one sentence that names it, and no traceback.

Hundreds of commands, forked from a process that has imported everything; some of them run in the default tier, all in
`make test-slow`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import bad_data, bad_folders, bad_settings
from tests.faults.commands import Command
from tests.faults.forked_commands import ForkedCommand
from tests.integration.assets import make_model_folder, settings, write_feedback

REPOSITORY = Path(__file__).resolve().parents[2]
EVERY = 6
"""Of so many cases, one is in the default tier."""

LORA = {"model__peft__peft_scheme": "lora", "model__peft__lora_tuning__adapter_dim": 4}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} <eos> {% endfor %}"
OF_OPTIONS = 2
"""Exit code for options that argparse refuses."""
USAGE = re.compile(r"usage:|\s+[\[\w-]")
SENTENCE = re.compile(r"(nemo-kto[ \w-]*: )?(?:\[rank \S+\] )?error: .")


def some(names: Iterable[str]) -> list[Any]:
    """Return parameters, of which all but some are slow."""
    return [
        pytest.param(name, marks=() if number % EVERY == 0 else pytest.mark.slow) for number, name in enumerate(names)
    ]


@dataclass(frozen=True)
class Place:
    """Where a case happens.

    Attributes:
        root: What is in order: the models `hf` and `chat`, feedback in `train.jsonl`, `validation.jsonl` and
            `chats.jsonl`, and the log folders `run` and `adapted`.
        folder: An empty folder.
    """

    root: Path
    folder: Path

    @property
    def last(self) -> Path:
        """A checkpoint."""
        return self.root / "run" / "checkpoints" / "megatron_gpt-step=2-last"

    def training(self, *more: str, **changes: Any) -> list[str]:
        """Return the command line of a training run."""
        values = settings(self.root, self.folder / "log", trainer__kto__max_steps=2, **changes)
        return ["train", *(f"{key}={json.dumps(value)}" for key, value in values.items()), *map(self.filled, more)]

    def filled(self, text: str) -> str:
        """Return a text with names of folders for the words that stand for them."""
        for word, path in (("ROOT", self.root), ("LAST", self.last), ("HERE", self.folder)):
            text = text.replace(word, str(path))
        return text

    def refusal(self, arguments: list[str], **variables: str) -> str:
        """Run a command that has to be refused; return the sentence, or a few lines where it lists records."""
        ((code, output, errors),) = ForkedCommand(arguments, self.folder / "printed", **variables).end()
        print(errors, output)
        assert "Traceback" not in output + errors
        first, *more = [line for line in errors.splitlines() if line.strip() and not USAGE.match(line)]
        found = SENTENCE.match(first)
        assert found and code == (OF_OPTIONS if found[1] else 1), (code, first)
        assert len(more) < 13 and not any("error: " in line for line in more), more
        return self.emptied("\n".join([first, *more]))

    def emptied(self, text: str) -> str:
        """Undo `filled`."""
        for word, path in (("LAST", self.last), ("ROOT", self.root), ("HERE", self.folder)):
            text = text.replace(str(path), word)
        return text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=40, seed=1)
    write_feedback(folder / "validation.jsonl", number=11, seed=2)
    shutil.copytree(folder / "hf", folder / "chat")
    bad_folders.edit("tokenizer_config.json", chat_template=CHAT_TEMPLATE)(folder / "chat")
    (folder / "chats.jsonl").write_bytes(bad_data.messages(bad_data.USER, bad_data.ASSISTANT) * 40)
    for name, changes in (("run", {}), ("adapted", LORA)):
        place = Place(folder, folder / "making" / name)
        more = {"exp_manager__explicit_log_dir": str(folder / name), "export__enabled": True}
        saving = {"exp_manager__create_checkpoint_callback": True, **more, **changes}
        ((code, output, errors),) = ForkedCommand(place.training(**saving), place.folder).end()
        assert code == 0, output + errors
    return folder


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Place:
    return Place(root, tmp_path)


@pytest.mark.parametrize("overrides", some(bad_settings.CONFIGURATIONS))
def test_configurations(place: Place, overrides: str) -> None:
    separate = re.split(r"\s+(?=[a-z_]+\.[\w.]+=)", overrides)
    assert bad_settings.CONFIGURATIONS[overrides] in place.refusal(place.training(*separate))


@pytest.mark.parametrize("case", some(bad_settings.OVERRIDES))
def test_command_lines_of_training(place: Place, case: str) -> None:
    for name, content in bad_settings.CONFIGURATION_FILES.items():
        (place.folder / name).write_bytes(content)
    more, said = bad_settings.OVERRIDES[case]
    assert said in place.refusal(place.training(*more))


@pytest.mark.parametrize("line", some(bad_settings.COMMANDS))
def test_command_lines_of_other_commands(place: Place, line: str) -> None:
    arguments = [place.filled(word) for word in shlex.split(line)]
    assert bad_settings.COMMANDS[line] in place.refusal(arguments)


@pytest.mark.parametrize("case", some(bad_settings.ENVIRONMENTS))
def test_environments(place: Place, case: str) -> None:
    variables, said = bad_settings.ENVIRONMENTS[case]
    assert said in place.refusal(place.training(), **variables)


def with_data(place: Place, file: Path | str, model: Path) -> tuple[list[str], list[str]]:
    """Return the command lines of training with data, and of looking at it."""
    changes = {"model__data__data_prefix__train": str(file), "pretrained_checkpoint__restore_from_path": str(model)}
    tokenizer = ["--tokenizer", str(model), "--seq-length", "64"]
    return place.training(**changes), ["data", "check", str(file), *tokenizer]


@pytest.mark.parametrize("case", some(bad_data.FILES))
def test_data(place: Place, case: str) -> None:
    name, content, said = bad_data.FILES[case]
    (place.folder / name).write_bytes(content)
    model = place.root / ("chat" if case in bad_data.CONVERSATIONS else "hf")
    line = place.refusal(with_data(place, place.folder / name, model)[0])
    assert f"HERE/{name}" in line and said in line.replace(f"HERE/{name}", "", 1)


@pytest.mark.parametrize("case", some(bad_data.PLACES))
def test_places_of_data(place: Place, case: str) -> None:
    (place.folder / "data").mkdir()
    make, said = bad_data.PLACES[case]
    data = make(place.folder / "data")
    training, checking = with_data(place, data, place.root / "hf")
    assert said in place.refusal(training)
    ((code, output, errors),) = ForkedCommand(checking, place.folder / "printed").end()
    assert code == 1 and said in place.emptied(output + errors) and "Traceback" not in output + errors


@pytest.mark.parametrize("case", some(bad_folders.MODELS))
def test_model_folders(place: Place, case: str) -> None:
    spoil, said = bad_folders.MODELS[case]
    chats = "chat template" in case
    folder = Path(shutil.copytree(place.root / ("chat" if chats else "hf"), place.folder / "hf"))
    spoil(folder)
    arguments, _ = with_data(place, place.root / ("chats.jsonl" if chats else "train.jsonl"), folder)
    line = place.refusal(arguments)
    assert said in line and ("HERE/hf" in line or chats)


@pytest.mark.parametrize("key", ["restore_from_path", "checkpoint"])
@pytest.mark.parametrize("case", some(bad_folders.ADAPTERS))
def test_adapters(place: Place, case: str, key: str) -> None:
    spoil, said = bad_folders.ADAPTERS[case]
    folder = Path(shutil.copytree(place.root / "adapted" / "hf", place.folder / "adapter"))
    spoil(folder)
    prefix = "model__peft__lora_tuning__" if key == "restore_from_path" else "model__kto__reference__"
    line = place.refusal(place.training(**LORA, **{prefix + key: str(folder)}))
    assert said in line and "HERE/adapter" in line


TWO_RANKS: dict[str, tuple[dict[str, Any], str]] = {
    "bad data": ({"model__data__data_prefix__train": "HERE/bad.jsonl"}, "HERE/bad.jsonl:2"),
    "weights that are not finite": ({"pretrained_checkpoint__restore_from_path": "HERE/hf"}, "not finite"),
    "adapters of a reference that are not finite": (
        {**LORA, "model__kto__reference__checkpoint": "HERE/adapter"},
        "HERE/adapter/adapter_model.safetensors",
    ),
    "more than there is memory": (
        {**LORA, "model__peft__lora_tuning__adapter_dim": 10**9},
        "not enough memory: can't allocate",
    ),
    "a callback that cannot be made": (
        {"trainer__callbacks": [{"_target_": "collections.OrderedDict"}]},
        "OrderedDict",
    ),
}
"""What is wrong -> what is changed, and what is said: much of it is found when every rank reads its part."""


@pytest.mark.parametrize("case", some(TWO_RANKS))
def test_two_ranks_end_with_one_sentence(place: Place, case: str) -> None:
    """Nobody waits for the other one, and one of them speaks, or both say the same before they have met."""
    (place.folder / "bad.jsonl").write_bytes(bad_data.lines("{oops"))
    for name, source, weights in (("hf", "hf", "model"), ("adapter", "adapted/hf", "adapter_model")):
        folder = Path(shutil.copytree(place.root / source, place.folder / name))
        spoil = bad_folders.tensors(
            lambda found: {key: found[key] * torch.nan for key in found}, f"{weights}.safetensors"
        )
        spoil(folder)
    changes, said = TWO_RANKS[case]
    filled = {key: place.filled(value) if isinstance(value, str) else value for key, value in changes.items()}
    arguments = place.training(**filled, trainer__devices=2, model__tensor_model_parallel_size=2)
    ended = ForkedCommand(arguments, place.folder / "printed", ranks=2).end()
    everything = place.emptied("".join(output + errors for _, output, errors in ended))
    print(everything)
    assert [code for code, _, _ in ended] == [1, 1] and "Traceback" not in everything
    found = [
        line.partition("error: ")[2] for line in everything.splitlines() if re.match(r"(\[rank 1\] )?error: ", line)
    ]
    assert len(found) in (1, 2) and len(set(found)) == 1 and said in found[0], found


@pytest.mark.slow
def test_a_data_set_of_the_hub_without_network(place: Place) -> None:
    """In a process of its own: whether there is a network is asked when `datasets` is imported."""
    arguments = place.training(model__data__data_prefix__train="trl-lib/kto-mix-14k")[1:]
    script = REPOSITORY / "examples" / "nlp" / "kto" / "train_gpt_kto.py"
    code, _, errors = Command(
        place.folder / "command", [sys.executable, str(script), *arguments], HF_HUB_OFFLINE="1"
    ).end()
    (line,) = errors.splitlines()
    assert code == 1 and line.startswith(
        "error: train data: trl-lib/kto-mix-14k: no such file or folder, and no data set"
    )

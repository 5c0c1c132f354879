"""What is put on the Hub, and what is found out before: against a hub of this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from nemo_kto.errors import ConfigError, UploadError
from nemo_kto.runtime.checkpoint_folders import newest_whole
from nemo_kto.weights.hub import base_name, check_repository, upload
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, settings, train_on_rank, write_feedback
from tests.integration.test_command import run
from tests.weights.fake_hub import TOKEN, Hub, Repository, running_hub

KEY = "export.push_to_hub"
LATER = "Do it later."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process speaks to, with the token of its owner."""
    with running_hub() as found:
        speak_to(found.address, monkeypatch.setattr, monkeypatch.setenv)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield found


def speak_to(address: str, set_attribute: Callable[..., None], set_variable: Callable[..., None]) -> None:
    """Have the library, which is loaded, upload there, and in the way that needs no other servers."""
    set_attribute(constants, "ENDPOINT", address)
    set_attribute(constants, "HF_HUB_DISABLE_XET", True)
    set_attribute(constants, "HF_HUB_OFFLINE", False)
    for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        set_variable(name, value)


def refusal(repository: str, *, private: bool = True) -> str:
    with pytest.raises(ConfigError) as refused:
        check_repository(repository, private=private, key=KEY)
    assert TOKEN not in str(refused.value)
    return str(refused.value)


# what is found out before


def test_what_could_be_uploaded_is_let_pass_and_leaves_no_trace(hub: Hub) -> None:
    for name in ("me/new", "us/new", "alone"):
        check_repository(name, private=True, key=KEY)
    hub.repositories |= {"me/mine": Repository(private=True), "me/open": Repository(private=False)}
    check_repository("me/mine", private=True, key=KEY)
    check_repository("me/open", private=False, key=KEY)
    assert set(hub.repositories) == {"me/mine", "me/open"}
    assert all(line.startswith("GET ") for line in hub.asked)


@pytest.mark.parametrize(
    "name", ["a/b/c", "me/with space", "-me", "me/x..y", "me/x.git", "https://huggingface.co/me/x"]
)
def test_a_name_that_is_none_is_refused_without_a_question(hub: Hub, name: str) -> None:
    assert refusal(name).startswith(f"{KEY}={name} is no name of a repository: ")
    assert hub.asked == []


def test_a_token_in_the_place_of_a_name_is_not_repeated(hub: Hub) -> None:
    for name in (TOKEN, f"https://me:{TOKEN}@huggingface.co/me/x"):
        assert refusal(name) == (
            f"{KEY} holds a token or a password. Name the repository, as owner/name, and set HF_TOKEN."
        )


def test_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "Set HF_TOKEN, or run `hf auth login`." in refusal("me/x")


def test_with_a_token_that_does_not_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("them/x") == f"{KEY}=them/x: the token is of me, who may not write for them."
    hub.account["role"] = "read"
    assert "the token may only read" in refusal("me/y")
    hub.account["role"] = "fineGrained"  # which need not name all whose repositories it may write to
    check_repository("them/z", private=True, key=KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "the token is not valid" in refusal("me/z")


def test_a_repository_that_everybody_sees(hub: Hub) -> None:
    hub.repositories |= {"me/open": Repository(private=False)}
    for name in ("me/open", "open"):
        assert "is there already, and everybody sees it. Set export.hub_private=false" in refusal(name)


def test_offline_is_said_and_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("me/x") and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    message = refusal("me/x")
    assert (
        "http://127.0.0.1:9 cannot be reached from here" in message
        and "`nemo-kto export-hf --push-to-hub` later" in message
    )


def test_public_alone_says_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nemo_kto.cli", "export-hf", str(tmp_path), str(tmp_path / "hf"), "--public"]
    code, output, errors = run(words, PYTHONPATH=os.getcwd())
    assert (code, output) == (1, "") and errors.startswith("error: --public says who sees what --push-to-hub uploads")


# uploads


def folder_of(place: Path, **files: str) -> Path:
    place.mkdir()
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(content)
    return place


def test_a_folder_becomes_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "hf", model__safetensors="weights", config__json="{}", README__md="---\ntags: [a]\n---\n"
    )
    assert upload(folder, "alone", private=True, later=LATER) == f"{hub.address}/me/alone"
    there = hub.repositories["me/alone"]
    assert there.private and there.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    upload(folder, "us/open", private=False, later=LATER)
    assert not hub.repositories["us/open"].private


def test_what_is_left_of_another_model_goes(hub: Hub, tmp_path: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "picture.png": b"kept"}
    hub.repositories["me/x"] = Repository(private=True, files={**old, "config.json": b"old"})
    folder = folder_of(tmp_path / "hf", model__safetensors="weights", config__json="{}")
    upload(folder, "me/x", private=True, later=LATER)
    assert set(hub.repositories["me/x"].files) == {"model.safetensors", "config.json", "picture.png"}
    assert hub.repositories["me/x"].files["config.json"] == b"{}"


@pytest.mark.parametrize(
    ("base", "name", "line"),
    [
        ("/data/models/Llama-3.2-1B", "Llama-3.2-1B", 'base_model: "Llama-3.2-1B"\n'),
        (
            "/c/hub/models--meta-llama--Llama-3.2-1B/snapshots/0a1b",
            "meta-llama/Llama-3.2-1B",
            'base_model: "meta-llama/Llama-3.2-1B"\n',
        ),
        ("/data/it's a=b, [c]", "it's a=b, [c]", ""),
    ],
)
def test_an_adapter_names_its_base_as_others_call_it(
    hub: Hub, tmp_path: Path, base: str, name: str, line: str
) -> None:
    card = f"---\ntags:\n- kto\nbase_model: {json.dumps(Path(base).name)}\n---\n# x\n"
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    folder = folder_of(tmp_path / "hf", adapter_config__json=config, adapter_model__safetensors="w", README__md=card)
    upload(folder, "me/x", private=True, later=LATER)
    files = hub.repositories["me/x"].files
    assert json.loads(files["adapter_config.json"]) == {"peft_type": "LORA", "base_model_name_or_path": name}
    assert files["README.md"].decode() == f"---\ntags:\n- kto\n{line}---\n# x\n"
    assert files["adapter_model.safetensors"] == b"w"
    assert (folder / "adapter_config.json").read_text() == config and (folder / "README.md").read_text() == card
    assert base_name(base) == name


@pytest.mark.parametrize("refused", ["repos/create", "preupload", "/blobs/", "/commit/"])
def test_an_upload_that_fails_says_how_to_do_it_later(hub: Hub, tmp_path: Path, refused: str) -> None:
    folder = folder_of(tmp_path / "hf", model__safetensors="weights", config__json="{}")
    hub.refuses = refused
    with pytest.raises(UploadError) as failed:
        upload(folder, "me/x", private=True, later=LATER)
    message = str(failed.value)
    assert message.startswith(f"{folder} is complete, but could not be uploaded to me/x: ")
    assert message.endswith(f". {LATER}") and "\n" not in message
    assert TOKEN not in message and sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_became_public_since_training_began_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", config__json="{}")
    hub.repositories["me/x"] = Repository(private=False)
    with pytest.raises(UploadError, match="everybody sees it"):
        upload(folder, "me/x", private=True, later=LATER)
    assert hub.repositories["me/x"].files == {}


# a run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_model_folder(folder / "hf")
    write_feedback(folder / "train.jsonl", number=16, seed=1)
    return folder


def train_and_upload(port: int, overrides: dict[str, Any], address: str) -> str:
    """Return what training ends with: "" or the sentence of its error."""
    with pytest.MonkeyPatch.context() as patch:
        speak_to(address, patch.setattr, patch.setenv)
        try:
            train_on_rank(port, overrides)
        except (ConfigError, UploadError) as error:
            return str(error)
    return ""


def test_a_run_uploads_its_adapter_and_a_failure_loses_nothing(
    hub: Hub, root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """It fails once; the same command makes up for it, and does nothing a third time; then from a checkpoint."""
    log_dir = tmp_path / "log"
    values = settings(
        root,
        log_dir,
        trainer__kto__max_steps=1,
        model__peft__peft_scheme="lora",
        exp_manager__create_checkpoint_callback=True,
        export__enabled=True,
        export__push_to_hub="me/aligned",
    )
    hub.refuses = "/commit/"
    (failed,) = run_ranks(train_and_upload, 1, free_port(), values, hub.address)
    assert "could not be uploaded to me/aligned" in failed and failed.endswith(
        "Run the same command again, which then does only that."
    )
    assert (log_dir / "hf" / "adapter_model.safetensors").is_file()
    assert hub.repositories["me/aligned"].files == {}

    hub.refuses = None
    assert run_ranks(train_and_upload, 1, free_port(), values, hub.address) == [""]
    there = hub.repositories["me/aligned"]
    assert there.private and set(there.files) == {file.name for file in (log_dir / "hf").iterdir()}
    assert there.files["adapter_model.safetensors"] == (log_dir / "hf" / "adapter_model.safetensors").read_bytes()
    assert b"LoRA adapter aligned" in there.files["README.md"]
    note = json.loads((log_dir / "hub.json").read_text())
    assert note == {
        "folder": str(log_dir / "hf"),
        "step": 1,
        "repository": "me/aligned",
        "address": f"{hub.address}/me/aligned",
    }

    hub.asked.clear()
    assert run_ranks(train_and_upload, 1, free_port(), values, hub.address) == [""]
    assert all(line.startswith("GET ") for line in hub.asked)
    files = [path for path in log_dir.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [file for file in files if TOKEN.encode() in file.read_bytes()]

    # what goes on, or has come to its end, does not depend on the Hub; what cannot be read is done again
    hub.refuses = "/api/"
    assert run_ranks(train_and_upload, 1, free_port(), values, hub.address) == [""]
    hub.refuses = None
    there.files.clear()
    (log_dir / "hub.json").write_text('{"folder": "/cut')
    assert run_ranks(train_and_upload, 1, free_port(), values, hub.address) == [""]
    assert "adapter_model.safetensors" in there.files

    # a folder that somebody else has written is not uploaded
    mine = folder_of(tmp_path / "private", diary__txt="not for the Hub")
    other = {**values, "export.folder": str(mine), "export.push_to_hub": "me/other"}
    (refused,) = run_ranks(train_and_upload, 1, free_port(), other, hub.address)
    assert refused.startswith(f"export.folder={mine} was there already, and may be anything: it is not uploaded")
    assert "me/other" not in hub.repositories

    last = newest_whole(log_dir / "checkpoints")[0]
    export = ["export-hf", str(last), str(tmp_path / "merged"), "--merge", "--push-to-hub", "us/merged", "--public"]
    environment = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.getcwd()}
    code, output, errors = run([sys.executable, "-m", "nemo_kto.cli", *export], **environment)
    assert code == 0 and f"Uploaded to {hub.address}/us/merged\n" in output, output + errors
    assert not hub.repositories["us/merged"].private and "model.safetensors" in hub.repositories["us/merged"].files


def test_a_mistake_ends_a_run_before_it_begins(hub: Hub, root: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "nlp" / "kto" / "train_gpt_kto.py"
    values = settings(root, tmp_path / "log", export__enabled=True, export__push_to_hub="them/x")
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    code, output, errors = run([sys.executable, str(script), *words], HF_ENDPOINT=hub.address)
    assert (code, output) == (1, "")
    assert errors == "error: export.push_to_hub=them/x: the token is of me, who may not write for them.\n"
    assert not (tmp_path / "log").exists()

"""A run from an odd model folder, with a tokenizer from elsewhere: that model is trained, exported and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.distributed_harness import free_port
from tests.integration.assets import WORDS, make_model_folder, refusal_on_rank, settings
from tests.integration.test_adapter_runs import logits

PAD = 40
"""The tokenizer has no tokens between its words and this one, which is beyond the model's vocabulary."""

CHANGES: dict[str, Any] = {
    "trainer__kto__max_steps": 2,
    "model__optim__lr": 1e-2,
    "export__enabled": True,
    "exp_manager__create_checkpoint_callback": True,
}
EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and a tokenizer.

    The model is said to be tied and has an output layer of its own; it is saved without a prefix, in bfloat16, in two
    files, with a configuration of transformers 4 that names no dtype.
    """
    root = tmp_path_factory.mktemp("odd")
    model = make_model_folder(root / "model", tied=True)
    tensors = {name.removeprefix("model."): tensor.bfloat16() for name, tensor in load_model(model).items()}
    tensors[OUTPUT] = tensors[EMBEDDING].flip(1).contiguous()
    (model / "model.safetensors").unlink()
    parts = sorted(tensors)[:20], sorted(tensors)[20:]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, names in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "a_key_of_mine": [1, 2]}
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5, "do_sample": true}')

    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])} | {"<pad>": PAD}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(root / "tokenizer")
    (root / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 7}')
    return root


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(odd: Path, train: Callable[..., Path]) -> Callable[..., Path]:
    """Return `trained(world_size, **changes)`: two steps from the odd model; the log folder."""

    def run(world_size: int, **changes: Any) -> Path:
        folders = {
            "pretrained_checkpoint__restore_from_path": str(odd / "model"),
            "model__tokenizer__path": str(odd / "tokenizer"),
        }
        return train(world_size, **{**CHANGES, **folders, **changes})

    return run


@pytest.fixture(scope="module")
def divided(trained: Callable[..., Path]) -> Path:
    """Return the log folder of a run under pipeline parallelism, where the tie would join two processes."""
    return trained(2, model__pipeline_model_parallel_size=2)


def export(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Export a checkpoint as the command does."""
    import torch.distributed as dist

    from nemo_kto.commands.export import export_checkpoint

    dist.destroy_process_group()
    export_checkpoint(checkpoint, folder, dtype=dtype)


def test_the_export_is_like_the_source(odd: Path, divided: Path) -> None:
    source, hf = odd / "model", divided / "hf"
    for file in sorted(source.glob("*.safetensors")):
        given, back = load_file(file), load_file(hf / file.name)
        assert back.keys() == given.keys()
        assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert {file.name for file in hf.glob("*.safetensors")} == {file.name for file in source.glob("*.safetensors")}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, hf))
    assert after == {**before, "tie_word_embeddings": False}
    assert list(after) == list(before)
    assert (hf / "generation_config.json").read_text() == (source / "generation_config.json").read_text()
    assert AutoTokenizer.from_pretrained(hf).pad_token_id == PAD


def test_both_matrices_are_trained(odd: Path, divided: Path) -> None:
    """transformers finds the two, each moved by its own gradient."""
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (odd / "model", divided / "hf"))
    moved = [
        (after.get_parameter(name) - before.get_parameter(name)).float()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    assert all(move.abs().max() > 1e-3 for move in moved)
    assert not torch.equal(*moved)


def test_layouts_and_commands_agree(
    divided: Path, trained: Callable[..., Path], tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    """In float32, of checkpoints, so that no rounding to bfloat16 hides or makes a difference."""
    found = {}
    for name, log_dir in (("PP2", divided), ("TP2", trained(2, model__tensor_model_parallel_size=2))):
        (checkpoint,) = (log_dir / "checkpoints").glob("*-last")
        run_ranks(export, 1, checkpoint, tmp_path / name, "float32")
        found[name] = load_model(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["torch_dtype"], config["tie_word_embeddings"]) == ("float32", False)
    assert found["PP2"].keys() == found["TP2"].keys() == load_model(divided / "hf").keys()
    for key, tensor in found["PP2"].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(found["TP2"][key], tensor, rtol=1e-4, atol=1e-6)
        assert torch.equal(tensor.bfloat16(), load_model(divided / "hf")[key])


def test_a_run_exports_the_dtype_it_is_told(divided: Path, trained: Callable[..., Path]) -> None:
    log_dir = trained(1, export__dtype="float16")
    assert {tensor.dtype for tensor in load_model(log_dir / "hf").values()} == {torch.float16}
    assert json.loads((log_dir / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    theirs, ours = (
        logits(AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32))
        for folder in (divided, log_dir)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)  # float16 and bfloat16 of the same numbers


def test_a_run_goes_on_under_another_layout(divided: Path, trained: Callable[..., Path], tmp_path: Path) -> None:
    before = load_model(divided / "hf")
    copy = shutil.copytree(divided, tmp_path / "log")
    log_dir = trained(2, log_dir=copy, model__tensor_model_parallel_size=2, trainer__kto__max_steps=3)
    after = load_model(log_dir / "hf")
    assert after.keys() == before.keys()
    assert all((after[name] != before[name]).any() for name in (EMBEDDING, OUTPUT))


def test_a_record_with_a_token_that_the_model_lacks_is_named(
    odd: Path, root: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    records = [{"prompt": "red green", "completion": " blue", "label": number % 2 == 0} for number in range(16)]
    records[5]["prompt"] = "sea <pad> sky"
    file = tmp_path / "padded.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "pretrained_checkpoint__restore_from_path": str(odd / "model"),
        "model__tokenizer__path": str(odd / "tokenizer"),
        "model__data__data_prefix__train": str(file),
    }
    ((kind, message),) = run_ranks(refusal_on_rank, 1, free_port(), settings(root, tmp_path / "log", **changes))
    assert kind == "DataError"
    for part in (f"{file}: 1 samples hold", "'<pad>'", f"number {PAD}", "end at 21", "begins 'sea <pad> sky'"):
        assert part in message, message

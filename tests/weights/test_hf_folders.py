"""Hugging Face folders in and out: logits equal transformers', files come back bit by bit, bad folders are named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from nemo_kto.errors import CheckpointError
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import KTOGPTModel, build_gpt, initialize_weights
from nemo_kto.network.hf_config import hf_config_from_sizes, load_hf_config
from nemo_kto.network.stored import SafetensorsFolder
from nemo_kto.network.weight_rules import Piece
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout
from nemo_kto.weights.export_hf import export_hf
from nemo_kto.weights.import_hf import import_hf
from tests.network import tiny_hf

LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2},
    "TP2EP2": {"tensor": 2, "expert": 2, "expert_tensor": 1},
    "ETP2": {"expert_tensor": 2},
    "TP2WHOLE": {"tensor": 2, "expert_tensor": 1},
}
FOLDERS = [*tiny_hf.families(), "llama_files", "llama_bf16"]
SPARSE = [name for name, config in tiny_hf.families().items() if dimensions_of(config).mixture]
BIASED = [name for name in SPARSE if dimensions_of(tiny_hf.families()[name]).divided.expert_biases]


def folders_of(layout: str) -> list[str]:
    """Return the folders that can be divided so: only mixtures have experts, which are not divided with biases."""
    if layout == "TP2WHOLE":
        return BIASED
    names = SPARSE if LAYOUTS[layout].keys() & {"expert", "expert_tensor"} else FOLDERS
    return [name for name in names if name not in BIASED or layout not in ("TP2", "ETP2")]


CASES = [(layout, name) for layout in LAYOUTS for name in folders_of(layout)]
SMALL_FILE = 20_000


def division(layout: str, *, sequence: bool = False) -> Layout:
    """Return a layout by its name."""
    return Layout(world_size=1 if layout == "TP1" else 2, sequence=sequence, **LAYOUTS[layout])


def divide(layout: str) -> None:
    """Make the groups of `layout`: once for many models, as every group keeps threads."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(division(layout), seed=1)


def build(hf_config: Any, layout: str) -> KTOGPTModel:
    """Make this rank's part of a model, filled with NaN; its groups exist."""
    sequence = "tensor" in LAYOUTS[layout] and dimensions_of(hf_config).mixture is not None
    model = build_gpt(hf_config, division(layout, sequence=sequence))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


# what the ranks do


def convert_folders(source: Path, results: Path, layouts: list[str]) -> None:
    """Import every folder, save its logits, export it again, and note what was read."""
    enable_cpu()
    for layout in layouts:
        divide(layout)
        for name in folders_of(layout):
            hf_config = load_hf_config(source / name)
            model = build(hf_config, layout)
            with count_reads() as reads:
                import_hf(model, source / name)
            target = results / layout / name
            export_hf(
                [model],
                hf_config,
                target,
                source_folder=source / name,
                max_shard_bytes=SMALL_FILE if name in ("llama_files", "phi3") else 10**9,
            )
            logits, place = tiny_hf.packed_logits(model), parallel.position()
            if logits is not None and place.tp_rank == 0:
                torch.save(logits, target / "logits.pt")
            (target / f"reads{dist.get_rank()}.json").write_text(json.dumps(reads))
            try:
                export_hf([model], hf_config, target)
            except CheckpointError as error:
                (target / f"error{dist.get_rank()}.txt").write_text(str(error))
        export_random(results / layout / "random", layout)


def export_random(folder: Path, layout: str) -> None:
    """Export models with random weights."""
    dense = hf_config_from_sizes(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=tiny_hf.VOCAB_SIZE,
        max_position_embeddings=64,
    )
    for name, sizes in {"dense": dense, "experts": tiny_hf.families()["qwen3_moe_mixed"]}.items():
        if name == "dense" and LAYOUTS[layout].keys() & {"expert", "expert_tensor"}:
            continue
        model = build(sizes, layout)
        initialize_weights(model, seed=5, std=0.02)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        export_hf([model], sizes, folder / name)


class count_reads:
    """Within the block, `reads[name]` is the number of elements asked of each tensor of a folder."""

    def __enter__(self) -> dict[str, int]:
        """Start counting."""
        reads: dict[str, int] = {}
        self.original = read = SafetensorsFolder.read

        def counting(self: SafetensorsFolder, piece: Piece, region: tuple[slice, ...]) -> torch.Tensor:
            block = read(self, piece, region)
            reads[piece.name] = reads.get(piece.name, 0) + block.numel()
            return block

        SafetensorsFolder.read = counting
        return reads

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        SafetensorsFolder.read = self.original


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of folders made by transformers."""
    root = tmp_path_factory.mktemp("hf")
    for name, config in tiny_hf.families().items():
        tiny_hf.make_folder(root / name, config)
    llama = tiny_hf.families()["llama"]
    tiny_hf.make_folder(root / "llama_files", llama, max_shard_size="20KB")
    assert (root / "llama_files" / "model.safetensors.index.json").is_file()
    tiny_hf.make_folder(root / "llama_bf16", llama, dtype=torch.bfloat16)
    return root


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """Folder of what each layout made of the folders in `source`."""
    root = tmp_path_factory.mktemp("results")
    run_ranks(convert_folders, 1, source, root, ["TP1"])
    run_ranks(convert_folders, 2, source, root, [layout for layout in LAYOUTS if layout != "TP1"])
    return root


# what must come out


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_equal_transformers(source: Path, results: Path, name: str, layout: str) -> None:
    ours = torch.load(results / layout / name / "logits.pt")
    torch.testing.assert_close(ours, tiny_hf.transformers_logits(source / name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_export_returns_the_imported_file_bit_by_bit(source: Path, results: Path, name: str, layout: str) -> None:
    given, back = tiny_hf.stored_tensors(source / name), tiny_hf.stored_tensors(results / layout / name)
    assert back.keys() == given.keys()
    for key, tensor in given.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        assert (results / layout / name / file).read_text() == (source / name / file).read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_loads_the_export(source: Path, results: Path, name: str) -> None:
    exported = tiny_hf.transformers_logits(results / ("TP2WHOLE" if name in BIASED else "TP2") / name)
    # equal weights at other addresses in other files: matrix products may round differently
    torch.testing.assert_close(exported, tiny_hf.transformers_logits(source / name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2"])
def test_export_divides_large_weights_into_files(results: Path, layout: str) -> None:
    folder = results / layout / "llama_files"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 2
    tensors = tiny_hf.stored_tensors(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    header = 4096
    assert all(file.stat().st_size <= max(SMALL_FILE, largest) + header for file in files)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_unfinished_is_left(results: Path, layout: str) -> None:
    assert {path.name for path in (results / layout).iterdir()} == {*folders_of(layout), "random"}


def test_tensor_parallel_ranks_read_only_their_rows_and_columns(source: Path, results: Path) -> None:
    whole = {name: tensor.numel() for name, tensor in tiny_hf.stored_tensors(source / "qwen2_tied").items()}
    for rank, vocabulary_rows in enumerate((128, 3)):  # 131 tokens, padded to 2 x 128
        reads = json.loads((results / "TP2" / "qwen2_tied" / f"reads{rank}.json").read_text())
        assert reads.pop("model.embed_tokens.weight") == vocabulary_rows * 32
        assert reads.keys() == whole.keys() - {"model.embed_tokens.weight"}
        for name, elements in reads.items():
            shared = 1 if name.endswith("norm.weight") else 2
            assert elements == whole[name] // shared, name


def test_pipeline_stages_read_only_their_layers(results: Path) -> None:
    first, last = (json.loads((results / "PP2" / "llama" / f"reads{rank}.json").read_text()) for rank in range(2))
    layers = [{name.split(".")[2] for name in reads if ".layers." in name} for reads in (first, last)]
    assert layers == [{"0", "1"}, {"2", "3"}]
    outside = [{name for name in reads if ".layers." not in name} for reads in (first, last)]
    assert outside == [{"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}]


@pytest.mark.parametrize("layout", ["EP2", "TP2EP2", "ETP2"])
def test_ranks_read_only_their_experts(source: Path, results: Path, layout: str) -> None:
    whole = {name: tensor.numel() for name, tensor in tiny_hf.stored_tensors(source / "mixtral").items()}
    for rank, mine in enumerate(({"0", "1"}, {"2", "3"})):
        reads = json.loads((results / layout / "mixtral" / f"reads{rank}.json").read_text())
        experts = {name: elements for name, elements in reads.items() if ".experts." in name}
        assert {name.split(".experts.")[1][0] for name in experts} == ({*"0123"} if layout == "ETP2" else mine)
        shared = 2 if layout == "ETP2" else 1
        assert all(elements == whole[name] // shared for name, elements in experts.items())
        routers = [name for name in reads if name.endswith("block_sparse_moe.gate.weight")]
        assert len(routers) == 4 and all(reads[name] == whole[name] for name in routers)


RANDOM = [("dense", "TP2"), ("dense", "PP2"), *(("experts", layout) for layout in LAYOUTS if layout != "TP1")]


@pytest.mark.parametrize(("kind", "layout"), RANDOM)
def test_random_weights_do_not_depend_on_the_layout(results: Path, kind: str, layout: str) -> None:
    one, other = (tiny_hf.stored_tensors(results / name / "random" / kind) for name in ("TP1", layout))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_existing_folder_is_refused_on_every_rank(results: Path, layout: str) -> None:
    name = folders_of(layout)[0]
    for rank in range(1 if layout == "TP1" else 2):
        message = (results / layout / name / f"error{rank}.txt").read_text()
        assert str(results / layout / name) in message and "not empty" in message


# bad folders


def broken_folders(source: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield folders that cannot be imported, with what the error must name."""
    tensors = tiny_hf.stored_tensors(source / "llama")
    gone = "model.layers.2.mlp.up_proj.weight"

    def folder(name: str) -> Path:
        path = root / name
        path.mkdir()
        return path

    def save(name: str, changed: dict[str, torch.Tensor]) -> Path:
        path = folder(name)
        save_file(changed, path / "model.safetensors")
        return path

    yield folder("empty"), "holds no weights"
    old = folder("old")
    (old / "pytorch_model.bin").touch()
    yield old, "save_pretrained"
    yield save("missing", {key: value for key, value in tensors.items() if key != gone}), gone
    yield save("surplus", {**tensors, "model.layers.0.extra.weight": torch.zeros(1)}), "model.layers.0.extra.weight"
    yield save("shape", {**tensors, gone: torch.zeros(48, 33)}), f"{gone} has the shape [48, 33]"
    cut = folder("cut")
    (cut / "model.safetensors").write_bytes((source / "llama" / "model.safetensors").read_bytes()[:-100])
    yield cut, "model.safetensors cannot be read"
    index = folder("index")
    (index / "model.safetensors.index.json").write_text("{")
    yield index, "model.safetensors.index.json is not an index"
    lost = folder("lost")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (lost / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield lost, "model-00001-of-00001.safetensors cannot be read"


def import_broken(source: Path, root: Path) -> None:
    """Try to import each bad folder and compare the error; then import two unusual good ones."""
    enable_cpu()
    hf_config = load_hf_config(source / "llama")
    divide("TP1")
    model = build(hf_config, "TP1")
    for folder, wanted in broken_folders(source, root):
        with pytest.raises(CheckpointError) as caught:
            import_hf(model, folder)
        assert wanted in str(caught.value), str(caught.value)
        assert str(folder) in str(caught.value)

    tensors = tiny_hf.stored_tensors(source / "llama")
    (root / "buffers").mkdir()
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**tensors, **buffers}, root / "buffers" / "model.safetensors")
    import_hf(model, root / "buffers")
    assert torch.equal(model.output_layer.weight[: tiny_hf.VOCAB_SIZE], tensors["lm_head.weight"])

    tied = tiny_hf.stored_tensors(source / "llama_tied")
    (root / "twice").mkdir()
    twice = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    save_file(twice, root / "twice" / "model.safetensors")
    model = build(load_hf_config(source / "llama_tied"), "TP1")
    import_hf(model, root / "twice")
    assert torch.equal(model.output_weight()[: tiny_hf.VOCAB_SIZE], tied["model.embed_tokens.weight"])


def test_bad_folders_are_named(source: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    run_ranks(import_broken, 1, source, tmp_path)


# what goes beside the weights


def export_beside_foreign_files(source: Path, companions: Path, target: Path) -> None:
    """Export a llama model in bfloat16, with the tokenizer of a folder that holds another model."""
    enable_cpu()
    divide("TP1")
    hf_config = load_hf_config(source)
    model = build(hf_config, "TP1")
    import_hf(model, source)
    export_hf([model], hf_config, target, source_folder=companions, dtype=torch.bfloat16)
    assert hf_config.dtype == torch.float32  # the given configuration is left alone


def test_companion_files_and_configuration(source: Path, tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    tokenizer, target = tmp_path / "tokenizer", tmp_path / "target"
    (tokenizer / "additional_chat_templates").mkdir(parents=True)
    copied = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    for name in copied:
        (tokenizer / name).write_text(name)
    (tokenizer / "config.json").write_text((source / "qwen3" / "config.json").read_text())  # of another model
    (tokenizer / "model.safetensors").write_text("weights of another model")

    run_ranks(export_beside_foreign_files, 1, source / "llama", tokenizer, target)

    written = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert written == {*copied, "config.json", "model.safetensors"}
    assert (target / "chat_template.jinja").read_text() == "chat_template.jinja"
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert {tensor.dtype for tensor in tiny_hf.stored_tensors(target).values()} == {torch.bfloat16}

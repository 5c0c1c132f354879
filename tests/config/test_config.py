"""The configuration: defaults agree with the YAML, every key is read, and what is wrong is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kto.config import compose
from nemo_kto.config.compose import parse_config
from nemo_kto.config.folders import config_dir
from nemo_kto.config.legacy import ABSENT, IGNORED, NEUTRAL, RENAMED
from nemo_kto.config.reader import leaf_types, leaf_values
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from tests.distributed_harness import free_port
from tests.integration.assets import make_model_folder, settings, train_on_rank, write_feedback

ROOT = Path(__file__).resolve().parents[2]
YAML = OmegaConf.load(config_dir() / "gpt_kto.yaml")

# keys of NeMo-Aligner 0.7.0's gpt_kto.yaml with its values, where those are possible here
ALIGNER = {
    "trainer.num_nodes": 8,
    "trainer.devices": 8,
    "trainer.accelerator": "gpu",
    "trainer.kto.max_epochs": 1,
    "trainer.kto.max_steps": -1,
    "trainer.kto.val_check_interval": 0.1,
    "trainer.kto.save_interval": 100,
    "trainer.kto.limit_train_batches": 1.0,
    "trainer.kto.limit_val_batches": 1.0,
    "trainer.kto.gradient_clip_val": 1.0,
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.use_distributed_sampler": False,
    "trainer.max_time": None,
    "trainer.max_epochs": 1,
    "trainer.max_steps": -1,
    "exp_manager.explicit_log_dir": "/results",
    "exp_manager.exp_dir": None,
    "exp_manager.name": "megatron_gpt",
    "exp_manager.max_time_per_run": None,
    "exp_manager.create_wandb_logger": False,
    "exp_manager.wandb_logger_kwargs": {"project": "nemo_aligner_kto", "name": "rlhf_gpt3_kto"},
    "exp_manager.resume_from_checkpoint": None,
    "exp_manager.resume_if_exists": True,
    "exp_manager.resume_ignore_no_checkpoint": True,
    "exp_manager.create_checkpoint_callback": True,
    "exp_manager.checkpoint_callback_params.monitor": "val_loss",
    "exp_manager.checkpoint_callback_params.save_top_k": 3,
    "exp_manager.checkpoint_callback_params.mode": "min",
    "exp_manager.checkpoint_callback_params.always_save_nemo": False,
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": True,
    "exp_manager.checkpoint_callback_params.filename": "megatron_gpt--{val_loss:.3f}-{step}",
    "exp_manager.checkpoint_callback_params.model_parallel_size": 1,
    "pretrained_checkpoint.restore_from_path": None,
    "model.mcore_gpt": True,
    "model.micro_batch_size": 1,
    "model.global_batch_size": 64,
    "model.megatron_amp_O2": True,
    "model.kto.log_prob_forward_micro_batch_size": 2,
    "model.kto.ref_policy_kl_penalty": 0.2,
    "model.kto.desirable_loss_weight": 1.0,
    "model.kto.undesirable_loss_weight": 1.0,
    "model.kto.preference_average_log_probs": False,
    "model.kto.sft_average_log_probs": False,
    "model.kto.preference_loss_weight": 1,
    "model.kto.sft_loss_weight": 0,
    "model.encoder_seq_length": 2048,
    "model.seed": 1234,
    "model.peft.peft_scheme": "none",
    "model.peft.restore_from_path": None,
    "model.peft.restore_from_ckpt.checkpoint_dir": None,
    "model.peft.restore_from_ckpt.checkpoint_name": None,
    "model.peft.lora_tuning.target_modules": ["attention_qkv"],
    "model.peft.lora_tuning.adapter_dim": 32,
    "model.peft.lora_tuning.weight_tying": False,
    "model.optim.name": "distributed_fused_adam",
    "model.optim.bucket_cap_mb": 200,
    "model.optim.overlap_grad_sync": False,
    "model.optim.contiguous_grad_buffer": True,
    "model.optim.lr": 9e-6,
    "model.optim.weight_decay": 0.1,
    "model.optim.betas": [0.9, 0.98],
    "model.optim.sched.name": "CosineAnnealing",
    "model.optim.sched.warmup_steps": 10,
    "model.optim.sched.constant_steps": 1000,
    "model.optim.sched.min_lr": 9e-7,
    "model.data.data_impl": "jsonl",
    "model.data.splits_string": None,
    "model.data.seq_length": 2048,
    "model.data.skip_warmup": True,
    "model.data.num_workers": 0,
    "model.data.dataloader_type": "single",
    "model.data.reset_position_ids": False,
    "model.data.reset_attention_mask": False,
    "model.data.eod_mask_loss": False,
    "model.data.index_mapping_dir": None,
    "model.data.data_prefix": {"train": ["t.jsonl"], "validation": ["v.jsonl"], "test": ["x.jsonl"]},
    "model.overwrite_base_config.data.data_prefix": True,
    "precision": 32,
}

# fields that only say which of today's single possibilities is meant: config.py judges their values, nothing else asks
SINGLE_VALUED = {"model.optim.name"}


def parse(*overrides: str) -> KTOConfig:
    return parse_config(OmegaConf.merge(YAML, OmegaConf.from_dotlist(list(overrides))))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    config = OmegaConf.create({})
    for key, value in flat.items():
        OmegaConf.update(config, key, value, force_add=True)
    return OmegaConf.to_container(config)  # type: ignore[return-value]


def yaml_leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in node.items():
        leaves |= yaml_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def test_yaml_has_exactly_the_fields_with_their_defaults():
    assert yaml_leaves(OmegaConf.to_container(YAML)) == leaf_values(KTOConfig())
    assert parse_config(YAML) == KTOConfig() == parse_config({})


def test_every_key_is_documented_with_its_default():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip().strip("`") for cell in line.split("|")[1:3]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    documented = {key: OmegaConf.create(f"value: {default}").value for key, default in rows}
    assert documented == leaf_values(KTOConfig())


RECOMPUTED = {"granularity": "full", "method": "uniform", "num_layers": 1}


def train_and_record(port: int, overrides: dict[str, Any]) -> set[str]:
    """Return the fields, as Class.field, that a run reads after its configuration has been parsed."""
    read: set[str] = set()
    classes = {type(part) for part in parts_of(KTOConfig())}

    def record(self: Any, name: str) -> Any:
        if name in type(self).__dataclass_fields__:
            read.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    original = parse_config

    def parse_then_record(raw: Any) -> KTOConfig:
        for cls in classes:
            cls.__getattribute__ = object.__getattribute__
        config = original(raw)
        for cls in classes:
            cls.__getattribute__ = record
        return config

    compose.parse_config = parse_then_record
    try:
        train_on_rank(port, overrides)
    finally:
        compose.parse_config = original
        for cls in classes:
            cls.__getattribute__ = object.__getattribute__
    return read


def parts_of(part: Any) -> list[Any]:
    """Return a configuration's part and those below it."""
    fields = vars(part).values()
    return [part, *(below for field in fields if dataclasses.is_dataclass(field) for below in parts_of(field))]


def test_every_field_is_read(tmp_path: Path, run_ranks: Callable[..., Any]) -> None:
    """A key that no run reads does nothing, which a user cannot see."""
    make_model_folder(tmp_path / "hf")
    write_feedback(tmp_path / "train.jsonl", number=8, seed=1)
    start = settings(tmp_path, tmp_path / "a", trainer__kto__max_steps=1, export__enabled=True)
    start["model.data.data_prefix.validation"] = start["model.data.data_prefix.train"]
    scratch = {**start, "exp_manager.explicit_log_dir": None, "exp_manager.exp_dir": str(tmp_path / "b")}
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    scratch |= {f"model.{name}": size for name, size in sizes.items()} | {"model.max_position_embeddings": 64}
    scratch |= {"pretrained_checkpoint.restore_from_path": None, "model.tokenizer.path": str(tmp_path / "hf")}
    scratch |= {f"model.activations_checkpoint_{name}": value for name, value in RECOMPUTED.items()}
    adapters = {**start, "exp_manager.explicit_log_dir": str(tmp_path / "c"), "model.peft.peft_scheme": "lora"}
    adapters |= {"model.kto.reference.mode": "cached", "model.kto.reference.cache_dir": str(tmp_path / "d")}
    read = set().union(*(run_ranks(train_and_record, 1, free_port(), run)[0] for run in (start, scratch, adapters)))
    parts = {key.rpartition(".")[0] for key in leaf_types(KTOConfig)}
    names = {path: type(functools.reduce(getattr, path.split("."), KTOConfig())).__name__ for path in parts}
    unread = {
        key
        for key in set(leaf_types(KTOConfig)) - SINGLE_VALUED
        if f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" not in read
    }
    assert not unread


def test_aligner_keys_are_all_known():
    config = parse_config(nested(ALIGNER))
    assert config.trainer.devices == 8
    assert config.model.data.seq_length == 2048
    assert config.model.data.data_prefix.train == ["t.jsonl"]
    assert config.model.optim.name == "distributed_fused_adam"
    assert config.model.optim.lr == 9e-6


def test_ignored_keys_are_named_in_one_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="nemo_kto.config"):
        parse("model.mcore_gpt=true", "model.megatron_amp_O2=true", "model.peft.lora_tuning.row_init_method=zero")
    assert len(caplog.records) == 1
    for key in ("model.mcore_gpt", "model.megatron_amp_O2", "model.peft.lora_tuning.row_init_method"):
        assert key in caplog.text


def test_ignored_keys_are_named_by_one_rank_only(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with caplog.at_level(logging.WARNING, logger="nemo_kto.config"):
        parse("model.mcore_gpt=true")
    assert not caplog.records


def test_tables_of_old_keys_do_not_shadow_todays():
    known = set(leaf_types(KTOConfig))
    assert not known & set(IGNORED)
    assert not known & set(NEUTRAL)
    assert not known & set(RENAMED)
    assert set(RENAMED.values()) <= known
    assert set(ABSENT) <= known


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.max_steps=7", "trainer.kto.max_steps", 7),
        ("trainer.max_time=00:01:00:00", "exp_manager.max_time_per_run", "00:01:00:00"),
        ("model.encoder_seq_length=77", "model.data.seq_length", 77),
        ("trainer.val_check_interval=3", "trainer.kto.val_check_interval", 3),
        ("model.data.data_prefix.train=a.jsonl", "model.data.data_prefix.train", ["a.jsonl"]),
        ("model.data.data_prefix=null", "model.data.data_prefix.train", None),
        (
            "exp_manager.checkpoint_callback_params.monitor=val/loss",
            "exp_manager.checkpoint_callback_params.monitor",
            "val_loss",
        ),
        ("trainer.devices=auto", "trainer.devices", "auto"),
        ("trainer.num_nodes=auto", "trainer.num_nodes", "auto"),
        ("trainer.kto.limit_val_batches=2", "trainer.kto.limit_val_batches", 2),
        ("trainer.precision=32-true", "trainer.precision", 32),
        ("trainer.precision=bf16", "trainer.precision", "bf16-mixed"),
        ("trainer.precision=16", "trainer.precision", "16-mixed"),
        ("precision=bf16-mixed", "trainer.precision", "bf16-mixed"),
        ("model.optim.lr=1", "model.optim.lr", 1.0),
        ("model.peft.lora_tuning.target_modules=all", "model.peft.lora_tuning.target_modules", ["all"]),
        ("model.peft.lora_tuning.layer_selection=[1,3]", "model.peft.lora_tuning.layer_selection", [1, 3]),
        (
            "model.peft.lora_tuning.rank_pattern={k_proj: 8, model.layers.0.self_attn.q_proj: 4}",
            "model.peft.lora_tuning.rank_pattern",
            {"k_proj": 8, "model.layers.0.self_attn.q_proj": 4},
        ),
        ("model.data.shuffle=batches", "model.data.shuffle", "batches"),
        ("model.data.data_prefix.train=a.jsonl", "model.data.data_prefix.train", ["a.jsonl"]),
        (
            "model.data.data_prefix.train={path: a, weight: 2}",
            "model.data.data_prefix.train",
            [{"path": "a", "weight": 2}],
        ),
        ("model.data.fields={label: liked}", "model.data.fields", {"label": "liked"}),
        ("model.data.desirable_if='>= 4'", "model.data.desirable_if", ">= 4"),
        ("model.kto.desirable_loss_weight=auto", "model.kto.desirable_loss_weight", "auto"),
        ("model.data.shuffle=false", "model.data.shuffle", False),
    ],
)
def test_accepted(override, key, value):
    assert leaf_values(parse(override))[key] == value
    assert type(leaf_values(parse(override))[key]) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown keys name the nearest
        ("model.micro_batch_sz=2", ["model.micro_batch_sz", "model.micro_batch_size?"]),
        ("model.kto.desireable_loss_weight=1", ["model.kto.desirable_loss_weight?"]),
        ("kto.ref_policy_kl_penalty=1", ["kto.ref_policy_kl_penalty", "model.kto.ref_policy_kl_penalty?"]),
        ("model.zzzz=1", ["model.zzzz", "docs/configuration.md"]),
        # types
        ("model.optim.lr=abc", ["model.optim.lr", "abc", "a number"]),
        ("model.optim.lr=.nan", ["model.optim.lr", "a number"]),
        ("model.global_batch_size=8.5", ["model.global_batch_size", "8.5", "an integer"]),
        ("model.global_batch_size=true", ["model.global_batch_size", "an integer"]),
        ("model.data.shuffle=1", ["model.data.shuffle", "true or false"]),
        ("exp_manager.name=3", ["exp_manager.name", "text"]),
        ("model.kto.kl_scope=rank", ["model.kto.kl_scope", "rank", "global_batch or micro_batch"]),
        ("model.kto=3", ["model.kto", "section"]),
        ("model.data.data_prefix=a.jsonl", ["model.data.data_prefix", "model.data.data_prefix.train"]),
        ("model.data.data_prefix.train=[1]", ["model.data.data_prefix.train", "text, a mapping, or a list of these"]),
        # ranges
        ("model.micro_batch_size=0", ["model.micro_batch_size=0", "at least 1"]),
        ("trainer.precision=bf16-true", ["trainer.precision=bf16-true", "32, bf16-mixed, 16-mixed"]),
        ("model.data.seq_length=1", ["model.data.seq_length=1", "at least 2"]),
        ("model.kto.ref_policy_kl_penalty=0", ["model.kto.ref_policy_kl_penalty=0", "above 0"]),
        ("trainer.kto.max_steps=0", ["trainer.kto.max_steps=0", "-1"]),
        ("trainer.kto.val_check_interval=1.5", ["trainer.kto.val_check_interval=1.5", "fraction"]),
        ("trainer.kto.limit_val_batches=0", ["trainer.kto.limit_val_batches=0", "validation files"]),
        ("exp_manager.max_time_per_run=5h", ["exp_manager.max_time_per_run=5h", "DD:HH:MM:SS"]),
        ("model.optim.betas=[0.9]", ["model.optim.betas", "two numbers"]),
        ("model.optim.name=muon", ["model.optim.name=muon is not available", "Take adam"]),
        ("model.optim.states=int8", ["model.optim.states=int8 is not available", "bfloat16"]),
        ("model.optim.states=float16", ["model.optim.states", "float32 or bfloat16"]),
        ("model.optim.offload_fraction=1.5", ["model.optim.offload_fraction", "at most 1"]),
        ("model.optim.lr=1e-9", ["model.optim.sched.min_lr", "model.optim.lr=1e-09"]),
        ("exp_manager.checkpoint_callback_params.monitor=loss", ["monitor=loss", "val_loss"]),
        ("exp_manager.create_wandb_logger=true", ["wandb_logger_kwargs"]),
        ("trainer.profile_steps=3", ["trainer.profile_steps=[3] must be", "like [10, 12]"]),
        ("trainer.profile_steps=[0,2]", ["trainer.profile_steps=[0, 2] must be", "counted from 1"]),
        ("trainer.profile_steps=[5,4]", ["trainer.profile_steps=[5, 4] must be"]),
        ("trainer.profile_steps=[1,2,3]", ["trainer.profile_steps=[1, 2, 3] must be"]),
        # recomputation and layout
        ("model.activations_checkpoint_granularity=full", ["checkpoint_method and", "num_layers", "uniform and 1"]),
        ("model.activations_checkpoint_method=block", ["checkpoint_method=block needs", "granularity=full"]),
        ("model.virtual_pipeline_model_parallel_size=0", ["virtual_pipeline_model_parallel_size=0", "at least 1"]),
        ("model.context_parallel_size=0", ["model.context_parallel_size=0", "at least 1"]),
        # adapters and the reference
        ("model.peft.peft_scheme=lora", ["model.peft.peft_scheme=lora needs", "restore_from_path"]),
        ("model.peft.peft_scheme=ia3", ["model.peft.peft_scheme", "none or lora or null"]),
        ("model.peft.lora_tuning.adapter_dim=0", ["adapter_dim=0", "at least 1"]),
        ("model.peft.lora_tuning.layer_selection=[1.5]", ["layer_selection", "list of integers"]),
        ("model.peft.lora_tuning.weight_tying=true", ["weight_tying=True", "leave it out"]),
        ("model.peft.restore_from_ckpt.checkpoint_dir=x", ["checkpoint_dir=x", "lora_tuning.restore_from_path"]),
        ("model.peft.restore_from_path=x", ["lora_tuning.restore_from_path=x needs", "peft_scheme=lora"]),
        ("export.merge_adapters=true", ["export.merge_adapters=true", "model.peft.peft_scheme=lora"]),
        ("model.peft.quantize_base=nf4", ["model.peft.quantize_base=nf4", "model.peft.peft_scheme=lora"]),
        ("model.peft.quantize_base=nf3", ["model.peft.quantize_base", "nf4 or int8 or null"]),
        ("model.peft.lora_tuning.dora=true", ["lora_tuning.dora needs", "peft_scheme=lora"]),
        ("model.peft.lora_tuning.modules_to_save=[lm_head]", ["modules_to_save needs", "peft_scheme=lora"]),
        ("model.peft.double_quantization=true", ["double_quantization=true", "quantize_base=nf4"]),
        ("export.merge_into_original=true", ["merge_into_original=true", "quantize_base", "merge_adapters=true"]),
        ("model.kto.reference.mode=adapter_off", ["mode=adapter_off", "model.peft.peft_scheme=lora"]),
        ("model.kto.reference.cache_dir=x", ["cache_dir=x", "mode=cached"]),
        ("model.kto.reference.sync_every_n_steps=0", ["sync_every_n_steps=0", "at least 1"]),
        ("model.kto.sft_loss_weight=-0.1", ["model.kto.sft_loss_weight=-0.1", "at least 0"]),
        ("model.kto.loss=dpo", ["model.kto.loss='dpo'", "apo_zero_unpaired"]),
        ("model.kto.humanline_clamp=[-1.0]", ["humanline_clamp=[-1.0]", "[-1.0, 1.5]"]),
        ("model.kto.humanline_clamp=[0.5,1.5]", ["humanline_clamp=[0.5, 1.5]", "below 0 and one above"]),
        ("model.kto.desirable_loss_weight=even", ["desirable_loss_weight", "a number or auto"]),
        # data
        ("trainer.num_nodes=0", ["trainer.num_nodes=0", "at least 1"]),
        ("trainer.num_nodes=all", ["trainer.num_nodes", "an integer or auto"]),
        ("model.data.overlong=keep", ["model.data.overlong", "truncate_prompt_left", "truncate_response"]),
        ("model.data.on_bad_record=warn", ["model.data.on_bad_record", "error or skip"]),
        ("model.data.special_tokens=yes", ["model.data.special_tokens", "auto or text or control"]),
        ("model.data.prompt_template=Question", ["prompt_template", "{prompt}", "chat"]),
        ("model.data.validation_fraction=1.0", ["validation_fraction=1.0", "below 1"]),
        ("model.data.validation_fraction=-0.1", ["validation_fraction=-0.1", "at least 0"]),
        ("model.data.tokenize_workers=0", ["tokenize_workers=0", "at least 1"]),
        ("model.data.fields=prompt", ["model.data.fields", "a mapping"]),
        ("model.data.splits_string=9,1", ["splits_string", "validation_fraction"]),
        ("model.data.eod_mask_loss=true", ["model.data.eod_mask_loss=True", "leave it out"]),
        # where the model comes from
        ("pretrained_checkpoint.restore_from_path=m.nemo", ["m.nemo", "Hugging Face folder"]),
        ("pretrained_checkpoint.restore_from_path=/no/such", ["/no/such", "not a folder"]),
        ("model.num_layers=2", ["model.hidden_size", "model.num_attention_heads"]),
        ("model.kto.kl_fraction=0", ["model.kto.kl_fraction=0", "above 0 and at most 1"]),
        ("model.kto.kl_fraction=1.5", ["model.kto.kl_fraction=1.5", "above 0 and at most 1"]),
        # interpolation
        ("model.data.seq_length='${model.nothing}'", ["model.data.seq_length", "model.nothing"]),
    ],
)
def test_refused(override, parts):
    with pytest.raises(ConfigError) as error:
        parse(override)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.kto.loss=bco", "model.kto.kl_scope=micro_batch"], ["kl_scope=micro_batch", "loss=bco", "no KL set"]),
        (
            ["model.kto.loss=apo_zero_unpaired", "model.kto.log_prob_forward_micro_batch_size=4"],
            ["log_prob_forward_micro_batch_size=4", "loss=apo_zero_unpaired"],
        ),
        (["model.kto.loss=bco", "model.kto.humanline_clamp=[-1.0,1.5]"], ["humanline_clamp", "loss=kto", "bco"]),
        (["model.kto.loss=bco", "model.kto.kl_fraction=0.5"], ["kl_fraction=0.5", "loss=bco", "no KL set"]),
        (
            ["model.kto.kl_scope=micro_batch", "model.kto.kl_fraction=0.5"],
            ["kl_fraction=0.5", "kl_scope=micro_batch", "Use kl_scope=global_batch"],
        ),
        (
            ["model.micro_batch_tokens=900", "model.micro_batch_size=2"],
            ["micro_batch_tokens=900", "micro_batch_size=2", "Use one"],
        ),
        (
            ["model.micro_batch_tokens=900", "model.kto.log_prob_forward_micro_batch_size=2"],
            ["micro_batch_tokens=900", "log_prob_forward_micro_batch_size=2", "Leave it out"],
        ),
        (
            ["model.micro_batch_tokens=900", "model.moe_aux_loss_coeff=0.1"],
            ["micro_batch_tokens=900", "moe_aux_loss_coeff=0.1", "Use model.micro_batch_size"],
        ),
        (
            ["model.micro_batch_tokens=900", "model.kto.kl_scope=micro_batch"],
            ["micro_batch_tokens=900", "kl_scope=micro_batch", "kl_scope=global_batch"],
        ),
        (
            ["model.kto.kl_scope=micro_batch", "model.micro_batch_size=1"],
            ["kl_scope=micro_batch", "model.micro_batch_size=1", "Raise it"],
        ),
        (["model.kto.reference.mode=cached", "model.kto.humanline_clamp=[-1.0,1.5]"], ["every token", "mode=cached"]),
        (
            ["model.kto.loss=bco", "model.kto.reference.sync_every_n_steps=5"],
            ["sync_every_n_steps=5", "loss=bco", "Leave it out"],
        ),
        (["model.kto.desirable_loss_weight=0", "model.kto.undesirable_loss_weight=0"], ["both 0", "nothing to learn"]),
        (
            ["model.kto.loss=bco", "exp_manager.checkpoint_callback_params.monitor=val_kl"],
            ["monitor=val_kl", "loss=bco", "val_loss"],
        ),
    ],
)
def test_combinations_without_sense_are_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        parse(*overrides)
    assert all(part in str(error.value) for part in parts), error.value
    for override in overrides:  # each alone is fine, or is refused for a reason of its own
        if "=0" not in override:
            parse(override, *(["model.micro_batch_size=2"] if "kl_scope=micro_batch" in override else []))


def test_learning_from_likelihood_alone_is_possible():
    parse(*[f"model.kto.{name}_loss_weight=0" for name in ("desirable", "undesirable")], "model.kto.sft_loss_weight=1")


LORA = ["model.peft.peft_scheme=lora", f"pretrained_checkpoint.restore_from_path={ROOT}"]
SYNC = "model.kto.reference.sync_every_n_steps=512"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([*LORA, "model.peft.lora_tuning.alpha=0"], ["alpha=0", "above 0"]),
        ([*LORA, "model.peft.lora_tuning.adapter_dropout=1"], ["adapter_dropout=1.0", "below 1"]),
        (
            [*LORA, "model.kto.reference.mode=adapter_off", "model.kto.reference.checkpoint=x"],
            ["checkpoint=x", "auto"],
        ),
        ([*LORA, 'model.peft.lora_tuning.rank_pattern={"(?i)q_proj": 2}'], ["(?i)q_proj", "no regular expression"]),
        ([*LORA, "model.peft.quantize_base=int8", "model.kto.reference.mode=cpu_swap"], ["int8", "cpu_swap", "auto"]),
        (
            [*LORA, "model.peft.quantize_base=int8", "model.peft.double_quantization=true"],
            ["double_quantization=true", "quantize_base=nf4"],
        ),
        ([*LORA, "model.vision.train=all"], ["model.vision.train=all", "peft_scheme=lora", "Use none"]),
        (["model.vision.train=projector"], ["model.vision.train=projector", "restore_from_path"]),
        ([*LORA, SYNC], ["sync_every_n_steps=512", "model.peft.peft_scheme=lora"]),
        ([SYNC, "model.kto.reference.mode=cached"], ["sync_every_n_steps=512", "mode=cached", "Use auto"]),
        ([SYNC, "model.kto.reference.sync_mixup_alpha=1.5"], ["sync_mixup_alpha=1.5", "at most 1"]),
        (["export.push_to_hub=me/x", "export.enabled=false"], ["export.push_to_hub needs export.enabled=true"]),
    ],
)
def test_refused_together(overrides, parts):
    with pytest.raises(ConfigError) as error:
        parse(*overrides)
    for part in parts:
        assert part in str(error.value)


def test_old_and_new_key_must_not_contradict():
    assert parse("trainer.max_steps=5", "trainer.kto.max_steps=5").trainer.kto.max_steps == 5
    with pytest.raises(ConfigError, match=r"trainer.max_steps=5 and trainer.kto.max_steps=6"):
        parse("trainer.max_steps=5", "trainer.kto.max_steps=6")


def test_config_dir_holds_the_yaml():
    assert (config_dir() / "gpt_kto.yaml").is_file()


def test_secrets_of_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be written to run.json, checkpoints and logs."""
    monkeypatch.setenv("MY_API_KEY", "planted-value")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    monkeypatch.setenv("HARMLESS", "planted-harmless")
    parse("exp_manager.name=short")
    parse("exp_manager.name=${oc.env:HARMLESS}")
    for override in (
        "exp_manager.name=${oc.env:MY_API_KEY}",
        "exp_manager.wandb_logger_kwargs={project: p, notes: 'x-${oc.env:MY_API_KEY}'}",
        "trainer.callbacks=[{_target_: a.B, key: '${oc.env:MY_API_KEY}'}]",
    ):
        with pytest.raises(ConfigError) as caught:
            parse(override)
        assert "the environment variable MY_API_KEY" in str(caught.value) and "planted" not in str(caught.value)


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data_prefix.train='a\\udcff.jsonl' has bytes in it that are no text"):
        parse_config(nested({"model.data.data_prefix.train": [{"path": "a\udcff.jsonl"}]}))

"""Every key of conf/gpt_kto.yaml as a typed field, and nothing else. docs/configuration.md explains them.

Defaults live here (and, equal, in the YAML, which is what users read).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class TrainerKTOConfig:
    """`trainer.kto`: length of the run and what happens when."""

    max_epochs: int | None = 1
    max_steps: int | None = -1
    val_check_interval: int | float = 0.1
    save_interval: int | None = 100
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    gradient_clip_val: float | None = 1.0
    on_nan: Literal["error", "skip_step"] = "error"
    max_skipped_steps: int = 10


@dataclass(kw_only=True)
class TrainerConfig:
    """`trainer`: processes and precision."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int | Literal["auto"] = 1
    precision: int | str = 32
    deterministic: bool = False
    log_every_n_steps: int = 1
    timeout_minutes: float = 10.0
    profile_steps: list[int] | None = None
    callbacks: list[dict[str, Any]] | None = None
    kto: TrainerKTOConfig = field(default_factory=TrainerKTOConfig)


@dataclass(kw_only=True)
class CheckpointCallbackConfig:
    """`exp_manager.checkpoint_callback_params`: which checkpoints are kept besides the last."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    save_top_k: int = 3
    async_save: bool = False


@dataclass(kw_only=True)
class ExpManagerConfig:
    """`exp_manager`: logs, checkpoints, resuming."""

    explicit_log_dir: str | None = None
    exp_dir: str | None = None
    name: str = "megatron_gpt"
    max_time_per_run: str | None = None
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] | None = None
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] | None = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    create_checkpoint_callback: bool = True
    verify_checkpoints: bool = True
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)


@dataclass(kw_only=True)
class PretrainedCheckpointConfig:
    """`pretrained_checkpoint`: where training starts."""

    restore_from_path: str | None = None


@dataclass(kw_only=True)
class ExportConfig:
    """`export`: the Hugging Face folder, or the adapter's, written at the end."""

    enabled: bool = True
    folder: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    merge_adapters: bool = False
    merge_into_original: bool = False
    push_to_hub: str | None = None
    hub_private: bool = True


@dataclass(kw_only=True)
class EvaluationConfig:
    """`evaluation`: what examples/nlp/kto/eval_gpt_kto.py scores."""

    checkpoint: str | None = None
    output: str | None = None


@dataclass(kw_only=True)
class GenerationConfig:
    """`generation`: prompts that are answered while the model is trained."""

    num_prompts: int = 0
    every_n_validations: int = 1
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(kw_only=True)
class ReportConfig:
    """`report`: the page with pictures, written at the end."""

    enabled: bool = True


@dataclass(kw_only=True)
class TokenizerConfig:
    """`model.tokenizer`."""

    path: str | None = None
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class ReferenceConfig:
    """`model.kto.reference`: how the reference policy is held."""

    mode: Literal["auto", "cpu_swap", "resident", "adapter_off", "cached"] = "auto"
    checkpoint: str | None = None
    cache_dir: str | None = None
    sync_every_n_steps: int | None = None
    sync_mixup_alpha: float = 0.6


@dataclass(kw_only=True)
class KTOLossConfig:
    """`model.kto`: the algorithm."""

    loss: str = "kto"
    ref_policy_kl_penalty: float = 0.2
    desirable_loss_weight: float | Literal["auto"] = 1.0
    undesirable_loss_weight: float | Literal["auto"] = 1.0
    kl_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    loss_reduction: Literal["sample_mean", "class_mean"] = "sample_mean"
    preference_average_log_probs: bool = False
    humanline_clamp: list[float] | None = None
    sft_loss_weight: float = 0.0
    sft_average_log_probs: bool = True
    kl_fraction: float = 1.0
    log_prob_forward_micro_batch_size: int | None = None
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


@dataclass(kw_only=True)
class LoRAConfig:
    """`model.peft.lora_tuning`: adapters of low rank beside frozen projections."""

    target_modules: list[str] = field(default_factory=lambda: ["attention_qkv"])
    adapter_dim: int = 32
    alpha: float | None = None
    adapter_dropout: float = 0.0
    layer_selection: list[int] | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] | None = None
    restore_from_path: str | None = None


@dataclass(kw_only=True)
class PeftConfig:
    """`model.peft`: which parameters are trained."""

    peft_scheme: Literal["none", "lora"] | None = "none"
    lora_tuning: LoRAConfig = field(default_factory=LoRAConfig)
    quantize_base: Literal["nf4", "int8"] | None = None
    double_quantization: bool = False


@dataclass(kw_only=True)
class VisionConfig:
    """`model.vision`: what sees images in a model that does."""

    train: Literal["none", "projector", "all"] = "none"


@dataclass(kw_only=True)
class SchedConfig:
    """`model.optim.sched`: learning rate over time."""

    name: Literal["CosineAnnealing", "LinearAnnealing", "Constant"] = "CosineAnnealing"
    warmup_steps: int = 10
    constant_steps: int = 0
    min_lr: float = 1.0e-7


@dataclass(kw_only=True)
class OptimConfig:
    """`model.optim`: Adam with decoupled weight decay, its state divided among the data-parallel ranks."""

    name: Literal["adam", "adamw", "distributed_fused_adam"] = "adam"
    lr: float = 1.0e-6
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1.0e-8
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    states: Literal["float32", "bfloat16"] = "float32"
    offload_fraction: float = 0.0
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass(kw_only=True)
class DataPrefixConfig:
    """`model.data.data_prefix`: data by split; a single entry may be given without a list."""

    train: list[str | dict[str, Any]] | None = None
    validation: list[str | dict[str, Any]] | None = None


@dataclass(kw_only=True)
class DataConfig:
    """`model.data`."""

    data_prefix: DataPrefixConfig = field(default_factory=DataPrefixConfig)
    validation_fraction: float = 0.0
    format: str = "auto"
    reader: str | None = None
    fields: dict[str, str] | None = None
    desirable_if: str | None = None
    labels: dict[str, list[str | float | bool]] | None = None
    json_strings: Literal["auto", "messages", "text"] = "auto"
    on_bad_record: Literal["error", "skip"] = "error"
    seq_length: int = 4096
    overlong: Literal["drop", "truncate_prompt_left", "truncate_response"] = "drop"
    prompt_template: str | None = None
    special_tokens: Literal["auto", "text", "control"] = "auto"
    system: Literal["keep", "merge_into_user", "drop"] = "keep"
    template_losses: Literal["error", "warn"] = "error"
    append_eod: bool = True
    shuffle: bool | Literal["batches"] = True
    num_workers: int = 0
    cache_dir: str | None = None
    tokenize_workers: int | None = None


@dataclass(kw_only=True)
class ModelConfig:
    """`model`: batch, layout, sizes, and the parts above."""

    seed: int = 1234
    micro_batch_size: int = 1
    micro_batch_tokens: int | None = None
    global_batch_size: int = 64
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    moe_aux_loss_coeff: float = 0.0
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    make_vocab_size_divisible_by: int = 128
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    max_position_embeddings: int | None = None
    rotary_base: float | None = None
    layernorm_epsilon: float | None = None
    share_embeddings_and_output_weights: bool | None = None
    init_method_std: float = 0.02
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    kto: KTOLossConfig = field(default_factory=KTOLossConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True)
class KTOConfig:
    """A whole run; attribute paths are the keys of conf/gpt_kto.yaml."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    pretrained_checkpoint: PretrainedCheckpointConfig = field(default_factory=PretrainedCheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

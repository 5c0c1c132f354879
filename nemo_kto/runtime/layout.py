"""The parallel layout of a run and what it has to divide: plain integers, checked before any process group exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_kto.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes of a run are divided.

    Attributes:
        world_size: Number of processes, one per device.
        tensor: Tensor-model-parallel size.
        sequence: Whether the tensor-parallel ranks divide the tokens between the layers they share.
        pipeline: Pipeline-model-parallel size.
        context: Context-parallel size: how many ranks share the tokens of a row through all layers.
        virtual: Model chunks of each pipeline stage; more than one interleaves the stages.
        first_stage_layers: Layers of the first pipeline stage; None for as many as the others.
        last_stage_layers: Layers of the last pipeline stage; None for as many as the others.
        expert: Expert-model-parallel size: among how many processes the experts of a layer are dealt.
        expert_tensor: Tensor-model-parallel size of the experts; None for that of everything else.
    """

    world_size: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    context: int = 1
    virtual: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def data(self) -> int:
        """Data-parallel size: what the other kinds of parallelism leave over."""
        return self.world_size // self.model_parallel

    @property
    def model_parallel(self) -> int:
        """Processes that hold one model together and work on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches of a rank is a multiple of this: interleaved stages work in whole rounds."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def expert_tensor_size(self) -> int:
        """Number of processes that share each expert."""
        return self.expert_tensor or self.tensor

    def __str__(self) -> str:
        """Return the layout as one readable line."""
        tensor = f"tensor {self.tensor}{' with sequence parallelism' if self.sequence else ''}"
        pipeline = f"pipeline {self.pipeline}{f' ({self.virtual} chunks each)' if self.virtual > 1 else ''}"
        experts = ""
        if self.expert > 1 or self.expert_tensor_size != self.tensor:
            experts = f", experts: expert {self.expert} x tensor {self.expert_tensor_size}"
        return (
            f"{self.world_size} process{'es' if self.world_size != 1 else ''}: "
            f"{tensor} x {pipeline}{f' x context {self.context}' if self.context > 1 else ''} x data {self.data}"
            f"{experts}"
        )


NF4_BLOCK = 64
"""Input channels of a weight that share a scale in NF4; see `network/quantised_weight.py`."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that a layout has to divide.

    Attributes:
        num_layers: Transformer layers.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        ffn_hidden_size: Channels inside the dense feed-forward layers; None without any.
        num_experts: Experts of each layer that has some; 0 for a dense model.
        expert_layers: Numbers of those layers, from 0.
        expert_ffn_hidden_size: Channels inside an expert.
        shared_ffn_hidden_size: Channels inside the expert that all tokens go through; 0 without any.
        expert_biases: Whether experts have biases.
        linear_key_heads: Key heads of linear attention; 0 without any.
        whole_inputs: Input channels of linear layers that tensor-parallel ranks each have all of.
        divided_inputs: Those that they divide.
        expert_inputs: Those of experts that the tensor-parallel ranks of experts divide.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int | None
    num_experts: int = 0
    expert_layers: Sequence[int] = ()
    expert_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    expert_biases: bool = False
    linear_key_heads: int = 0
    whole_inputs: Sequence[int] = ()
    divided_inputs: Sequence[int] = ()
    expert_inputs: Sequence[int] = ()


def check_blocks(layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError unless on each rank the input channels of all linear layers make up blocks of NF4."""
    block, size, expert_size = NF4_BLOCK, layout.tensor, layout.expert_tensor_size
    for channels, ranks in (
        *((channels, 1) for channels in sizes.whole_inputs),
        *((channels, size) for channels in sizes.divided_inputs),
        *((channels, expert_size) for channels in sizes.expert_inputs),
    ):
        if channels % (block * ranks):
            key = "model.tensor_model_parallel_size" if ranks == size else "model.expert_tensor_parallel_size"
            divided = f" on {ranks} ranks each ({key})" if ranks > 1 else ""
            raise ConfigError(
                f"model.peft.quantize_base=nf4: {block} input channels share a scale, and {channels} of a linear "
                f"layer{divided} are no whole number of such blocks. Use "
                f"{'fewer ranks, or ' if ranks > 1 and not channels % block else ''}int8."
            )


def check_layout(layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError that names the keys and numbers when `layout` cannot hold a model of `sizes`."""
    if layout.world_size % layout.model_parallel:
        context = f" x model.context_parallel_size={layout.context}" if layout.context > 1 else ""
        raise ConfigError(
            f"{layout.world_size} processes (trainer.devices x trainer.num_nodes) cannot be divided by "
            f"model.tensor_model_parallel_size={layout.tensor} x model.pipeline_model_parallel_size={layout.pipeline}"
            f"{context} = {layout.model_parallel}. Use a multiple of {layout.model_parallel} processes or smaller "
            "parallel sizes."
        )
    for name, value in (
        ("attention heads", sizes.num_attention_heads),
        ("key/value heads (query groups)", sizes.num_query_groups),
        ("key heads of linear attention", sizes.linear_key_heads),
        ("feed-forward units", sizes.ffn_hidden_size),
        ("units of the shared expert", sizes.shared_ffn_hidden_size),
    ):
        if value is not None and value % layout.tensor:
            raise ConfigError(
                f"The model's {value} {name} cannot be divided by model.tensor_model_parallel_size={layout.tensor}. "
                f"Choose a tensor-parallel size that divides {value}."
            )
    for name, value in (
        ("attention heads", sizes.num_attention_heads),
        ("key heads of linear attention", sizes.linear_key_heads),
    ):
        if value % (layout.tensor * layout.context):
            raise ConfigError(
                f"The model's {value} {name} cannot be divided by model.tensor_model_parallel_size={layout.tensor} x "
                f"model.context_parallel_size={layout.context}: context-parallel ranks share the heads that tensor "
                "parallelism leaves to each. Choose a smaller context-parallel size."
            )
    _check_stages(layout, sizes.num_layers)
    _check_experts(layout, sizes)


def _check_stages(layout: Layout, num_layers: int) -> None:
    """Raise a ConfigError when the pipeline's stages and chunks cannot hold the layers."""
    if layout.pipeline == 1:
        for key, value in (
            ("model.virtual_pipeline_model_parallel_size", layout.virtual if layout.virtual > 1 else None),
            ("model.num_layers_in_first_pipeline_stage", layout.first_stage_layers),
            ("model.num_layers_in_last_pipeline_stage", layout.last_stage_layers),
        ):
            if value is not None:
                raise ConfigError(f"{key}={value} needs model.pipeline_model_parallel_size above 1.")
        return
    given = [layers for layers in (layout.first_stage_layers, layout.last_stage_layers) if layers is not None]
    left, stages_left = num_layers - sum(given), layout.pipeline - len(given)
    if left < 0 or (stages_left and (left == 0 or left % stages_left)) or (not stages_left and left):
        named = f" ({' and '.join(map(str, given))} of them in the first or last stage)" if given else ""
        raise ConfigError(
            f"The model's {num_layers} layers{named} cannot be divided evenly by "
            f"model.pipeline_model_parallel_size={layout.pipeline}. Choose a size that divides them, or set "
            "model.num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage."
        )
    for layers in stage_sizes(layout, num_layers):
        if layers % layout.virtual:
            raise ConfigError(
                f"A pipeline stage's {layers} layers cannot be divided into "
                f"model.virtual_pipeline_model_parallel_size={layout.virtual} chunks. Choose a divisor of {layers}."
            )


def _check_experts(layout: Layout, sizes: ModelSizes) -> None:
    """Raise a ConfigError when the experts cannot be divided as the layout says, or there are none."""
    expert, tensor = layout.expert, layout.expert_tensor_size
    if not sizes.num_experts:
        for key, value in (
            ("model.expert_model_parallel_size", expert if expert > 1 else None),
            ("model.expert_tensor_parallel_size", layout.expert_tensor),
        ):
            if value is not None:
                raise ConfigError(f"{key}={value} needs a mixture of experts; this model is dense. Leave it out.")
        return
    if layout.tensor > 1 and not layout.sequence:
        raise ConfigError(
            f"model.tensor_model_parallel_size={layout.tensor} needs model.sequence_parallel=true with a mixture of "
            "experts: otherwise each of the processes would route every token."
        )
    if sizes.num_experts % expert:
        raise ConfigError(
            f"The model's {sizes.num_experts} experts cannot be divided by model.expert_model_parallel_size={expert}. "
            f"Choose a divisor of {sizes.num_experts}."
        )
    if sizes.expert_ffn_hidden_size % tensor:
        raise ConfigError(
            f"The {sizes.expert_ffn_hidden_size} channels of an expert cannot be divided by the experts' tensor-"
            f"parallel size {tensor}. Set model.expert_tensor_parallel_size to a divisor."
        )
    if tensor > 1 and sizes.expert_biases:
        raise ConfigError(
            f"The model's experts have biases, which the experts' tensor-parallel size {tensor} would add as many "
            "times. Set model.expert_tensor_parallel_size=1: each process then has whole experts."
        )
    together = expert * tensor * layout.pipeline
    if layout.world_size % together:
        raise ConfigError(
            f"{layout.world_size} processes (trainer.devices x trainer.num_nodes) cannot be divided by "
            f"model.expert_model_parallel_size={expert} x the experts' tensor-parallel size {tensor} "
            f"(model.expert_tensor_parallel_size) x model.pipeline_model_parallel_size={layout.pipeline} = "
            f"{together}. Use a multiple of {together} processes or smaller parallel sizes."
        )
    for stage, layers in enumerate(stage_layers(layout, sizes.num_layers)):
        if not set(layers) & set(sizes.expert_layers):
            # Megatron would not restore the experts' optimizer: a stage without any does not know its number of steps
            raise ConfigError(
                f"Pipeline stage {stage} would hold dense layers only ({', '.join(map(str, layers))}); each has to "
                "hold experts. Lower model.pipeline_model_parallel_size, or shift the layers with "
                "model.num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage."
            )


def stage_sizes(layout: Layout, num_layers: int) -> list[int]:
    """Return the number of layers of each pipeline stage; `_check_stages` has found that they can be divided."""
    given = {0: layout.first_stage_layers, layout.pipeline - 1: layout.last_stage_layers}
    known = {stage: layers for stage, layers in given.items() if layers is not None}
    others = (num_layers - sum(known.values())) // max(layout.pipeline - len(known), 1)
    return [known.get(stage, others) for stage in range(layout.pipeline)]


def stage_layers(layout: Layout, num_layers: int) -> list[list[int]]:
    """Return the layers of each pipeline stage of a checked `layout`, whose chunks take turns."""
    sizes = stage_sizes(layout, num_layers)
    stages: list[list[int]] = [[] for _ in sizes]
    start = 0
    for _ in range(layout.virtual):
        for layers, size in zip(stages, sizes, strict=True):
            end = start + size // layout.virtual
            layers.extend(range(start, end))
            start = end
    return stages


def padded_vocabulary(vocab_size: int, *, multiple: int, tensor_model_parallel_size: int) -> int:
    """Return `vocab_size` rounded up to `multiple`; a ConfigError if the tensor-parallel ranks cannot share that."""
    padded = -(-vocab_size // multiple) * multiple
    if padded % tensor_model_parallel_size:
        raise ConfigError(
            f"The vocabulary of {vocab_size} tokens, padded to {padded} by "
            f"model.make_vocab_size_divisible_by={multiple}, cannot be divided by "
            f"model.tensor_model_parallel_size={tensor_model_parallel_size}. "
            f"Set the former to a multiple of {tensor_model_parallel_size}."
        )
    return padded


def check_recompute_groups(layout: Layout, num_layers: int, group: int) -> None:
    """Raise a ConfigError when groups of `group` layers do not fit into the chunks of a checked `layout`."""
    for layers in sorted({size // layout.virtual for size in stage_sizes(layout, num_layers)}):
        if layers % group:
            raise ConfigError(
                f"model.activations_checkpoint_num_layers={group} does not divide the {layers} layers of a pipeline "
                f"stage or chunk, as activations_checkpoint_method=uniform needs. Use a divisor of {layers}."
            )


def check_batch(
    layout: Layout,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    kl_set_size: int,
    kl_micro_batch_size: int,
    micro_batch_tokens: int | None = None,
) -> None:
    """Raise a ConfigError when the batch sizes do not fit the number of data-parallel ranks.

    Args:
        layout: The layout.
        global_batch_size: Samples of a global batch.
        micro_batch_size: Samples of a micro-batch.
        kl_set_size: Documents in the KL set of a global batch; 0 for none.
        kl_micro_batch_size: Documents of a micro-batch of the KL set.
        micro_batch_tokens: Most tokens of a micro-batch, which then has any number of documents but none.
    """
    if global_batch_size % layout.data:
        raise ConfigError(
            f"model.global_batch_size={global_batch_size} cannot be divided by {layout.data} data-parallel ranks "
            f"({layout}). Use a multiple of {layout.data}."
        )
    if kl_set_size % layout.data:
        raise ConfigError(
            f"The KL set of {kl_set_size} documents, model.kto.kl_fraction of model.global_batch_size="
            f"{global_batch_size}, cannot be divided by {layout.data} data-parallel ranks ({layout}). "
            f"Choose a fraction that makes it a multiple of {layout.data}."
        )
    forward = "model.kto.log_prob_forward_micro_batch_size"
    sizes = [("model.micro_batch_size", micro_batch_size, global_batch_size)]
    if kl_set_size:
        sizes.append((forward, kl_micro_batch_size, global_batch_size))  # validation has the whole KL set
        sizes.append((forward, kl_micro_batch_size, kl_set_size))
    for key, size, total in sizes:
        share = total // layout.data
        if micro_batch_tokens is not None:
            key, size = "model.micro_batch_tokens", 1  # at the most, each document is a micro-batch of its own
        if share % size:
            raise ConfigError(
                f"{key}={size} does not divide a rank's share of the batch, {share} = {total} documents / "
                f"{layout.data} data-parallel ranks. Use a divisor of {share}."
            )
        if (share // size) % layout.micro_batch_multiple:
            raise ConfigError(
                f"{key}={size if micro_batch_tokens is None else micro_batch_tokens} makes {share // size} "
                f"micro-batches for each rank{'' if micro_batch_tokens is None else ' at the most'}; with interleaved "
                "stages (model.virtual_pipeline_model_parallel_size) that must be a multiple of "
                f"model.pipeline_model_parallel_size={layout.pipeline}."
            )

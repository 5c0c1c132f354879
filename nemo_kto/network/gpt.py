"""Megatron GPT models described by Hugging Face configurations: Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE.

Tensor legend: `T` tokens of a packed row, `h` hidden size, `v/t` rows of the padded vocabulary on this rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_kto.errors import ConfigError
from nemo_kto.network import moe
from nemo_kto.network.hf_config import check_hf_config, hf_config_from_sizes, load_hf_config, rope_parameters
from nemo_kto.network.layer_specs import attends_by_document, block_spec, check_transformer_impl
from nemo_kto.network.weight_rules import PaddedVocab, match, rules_for, sharded_leaves
from nemo_kto.runtime import parallel
from nemo_kto.runtime.layout import Layout

__all__ = [
    "KTOGPTModel",
    "Recompute",
    "build_gpt",
    "hf_config_from_sizes",
    "initialize_weights",
    "load_hf_config",
    "padded_vocabulary",
]


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What the backward pass computes again, to save the memory of keeping it.

    Attributes:
        granularity: `selective` for attention only, `full` for whole layers.
        method: With `full`: `uniform`, all layers in groups of `num_layers`; `block`, the first `num_layers` of each
            stage one by one.
        num_layers: See `method`.
    """

    granularity: str
    method: str | None = None
    num_layers: int | None = None

    def transformer_config(self) -> dict[str, Any]:
        """Return Megatron's fields."""
        fields = {"recompute_granularity": self.granularity}
        if self.granularity == "full":
            fields |= {"recompute_method": self.method, "recompute_num_layers": self.num_layers}
        return fields


class KTOGPTModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose last stage returns hidden states: the output layer is applied at response positions only.

    The output layer's weight stays an ordinary parameter of the model, so Megatron's gradient hooks, the exchange of
    tied embedding gradients between the first and the last stage and sharded checkpoints are untouched.

    It takes rows of packed documents: `packed_seq_params` in Megatron's format "thd" describes the whole row, also
    under context parallelism, where `input_ids` and `position_ids` are this rank's consecutive part of it.

    Attributes:
        vocab_size: Number of real tokens; rows of the output weight from there on are padding.
        padded_vocab_size: Rows of the embedding over all tensor-parallel ranks.
        family: Hugging Face's name of the architecture.
        attends_by_document: Whether its attention is `DocumentAttention` rather than Transformer Engine's.
    """

    def __init__(
        self, *args: Any, real_vocab_size: int, family: str, attends_by_document: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.family = family
        self.padded_vocab_size: int = self.vocab_size
        self.vocab_size = real_vocab_size
        self.attends_by_document = attends_by_document

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams, **kwargs: Any) -> torch.Tensor:
        """Return hidden states `[T, 1, h]`.

        Args:
            args: See GPTModel.
            packed_seq_params: The documents of the row.
            kwargs: See GPTModel.
        """
        if self.attends_by_document:
            # For Megatron the row is then one sequence. Its own way with "thd" wants each document's tokens dealt to
            # the context-parallel ranks in a zigzag; ours gives them consecutive parts of the row.
            packed_seq_params = replace(packed_seq_params, qkv_format="sbhd")
        hidden: torch.Tensor = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        return hidden

    def _preprocess(
        self,
        input_ids: Any,
        position_ids: Any,
        *args: Any,
        packed_seq_params: PackedSeqParams,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Return Megatron's inputs of the first layer, with the rotary embedding of each token's own position.

        `padding_mask` `[1, T]` is divided as the tokens are; Megatron does so on the first stage only.
        """
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            padding_mask = scatter_to_sequence_parallel_region(padding_mask.T.contiguous()).T
        described = replace(packed_seq_params, qkv_format="thd")  # else Megatron cuts the table into zigzag parts
        decoder_input, rotary, *rest = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=described, padding_mask=padding_mask, **kwargs
        )
        if self.attends_by_document:
            rotary = rotary[position_ids[0]]
        return (decoder_input, rotary, *rest)

    def output_weight(self) -> torch.nn.Parameter:
        """Return this rank's shard `[v/t, h]` of the output layer's weight, shared with the embedding if tied."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        # the layer itself is never called: run what Megatron hooks to that, to have the weight gathered first
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        if self.share_embeddings_and_output_weights:
            shared: torch.nn.Parameter = self.shared_embedding_or_output_weight()
            return shared
        weight: torch.nn.Parameter = self.output_layer.weight
        return weight

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states `[T, 1, h]`, after the final norm on the last stage."""
        return hidden_states


def build_gpt(
    hf_config: PretrainedConfig,
    layout: Layout,
    *,
    chunk: int = 0,
    transformer_impl: str = "auto",
    vocab_pad_multiple: int = 128,
    params_dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    moe_aux_loss_coeff: float = 0.0,
    unfused: bool = False,
) -> KTOGPTModel:
    """Return one chunk of this rank's part of the model, on the current device, with weights still to be set.

    `parallel.initialize` must have run. Fill the weights with `import_hf`, `initialize_weights` or a checkpoint.
    Dropout is off whatever `hf_config` says: policy and reference must score alike.

    Args:
        hf_config: Configuration of the model, from `load_hf_config` or `hf_config_from_sizes`.
        layout: The division the process groups were made for. The first chunk of the first pipeline stage holds the
            embedding, the last one of the last stage the final norm and the output layer.
        chunk: Which chunk of the stage, from 0, when stages are interleaved.
        transformer_impl: `transformer_engine`, `local` (torch's kernels), or `auto`: the first on CUDA where
            Transformer Engine can be imported, else the second.
        vocab_pad_multiple: The vocabulary is padded to a multiple of this, the same for every layout.
        params_dtype: Dtype of parameters and activations.
        recompute: What is computed again in the backward pass instead of being kept; None for nothing.
        moe_aux_loss_coeff: Weight of the loss that balances the experts' loads, in a mixture of experts.
        unfused: Build every projection outside the experts from Megatron's own linear layers, also with Transformer
            Engine, as adapters need them.

    Raises:
        ConfigError: The model, `transformer_impl` or the padded vocabulary does not fit.
    """
    check_hf_config(hf_config)
    use_transformer_engine = check_transformer_impl(transformer_impl)
    padded_vocab_size = padded_vocabulary(
        hf_config.vocab_size, multiple=vocab_pad_multiple, tensor_model_parallel_size=layout.tensor
    )
    config = TransformerConfig(
        **_division(layout),
        **_precision(params_dtype),
        **_architecture(hf_config),
        **moe.transformer_fields(hf_config, grouped_gemm=use_transformer_engine, aux_loss_coeff=moe_aux_loss_coeff),
        **_execution(recompute),
    )
    # like `bias_activation_fusion` one of the functions of `algorithms/pointwise.py`, see `keep_less_for_backward`; it
    # is for what `DocumentAttention` takes, not for Transformer Engine's rows
    config.apply_rope_fusion = attends_by_document(config, use_transformer_engine)
    place = parallel.position()
    pre_process = place.is_first_stage and chunk == 0
    post_process = place.is_last_stage and chunk == layout.virtual - 1
    chunk_number = chunk if layout.virtual > 1 else None
    rope = rope_parameters(hf_config)
    model = KTOGPTModel(
        config,
        block_spec(config, use_transformer_engine=use_transformer_engine, chunk=chunk_number, unfused=unfused),
        attends_by_document=attends_by_document(config, use_transformer_engine),
        vocab_size=padded_vocab_size,
        real_vocab_size=hf_config.vocab_size,
        family=hf_config.model_type,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
        vp_stage=chunk_number,
    )
    _mark_tensor_parallel_weights(model)
    moe.mark_expert_weights(model)
    _clear_vocabulary(model)
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        # Megatron knows Llama 3's scaling with one set of parameters only; the frequencies say everything
        model.rotary_pos_emb.inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    return model.to(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else model


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


@torch.no_grad()
def initialize_weights(model: KTOGPTModel, *, seed: int, std: float) -> None:
    """Fill the weights with random numbers that depend on `seed` only, never on the layout.

    Matrices are normal with mean 0 and standard deviation `std`, norms one, biases and padding rows zero. Each full
    tensor is drawn in float32 from a generator of its own, seeded by (`seed`, its name), and sliced: one at a time.
    """
    rules = rules_for(model)
    for leaf in sharded_leaves(model):
        layout = match(rules, leaf.key).layout
        if len(leaf.global_shape) == 1:
            leaf.data.fill_(0.0 if leaf.key.endswith("bias") else 1.0)
            continue
        generator = tensor_generator(seed, leaf.key)
        full = torch.randn(leaf.global_shape, generator=generator, dtype=torch.float32, device="cpu").mul_(std)
        if isinstance(layout, PaddedVocab):
            full[layout.vocab_size :] = 0.0
        leaf.data.copy_(full[leaf.region])


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator that the tensor `name` is drawn from, on whichever rank."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


def _architecture(hf: PretrainedConfig) -> dict[str, Any]:
    """Return the TransformerConfig fields that say what the model computes."""
    heads = hf.num_attention_heads
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": getattr(hf, "num_key_value_heads", None) or heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": hf.model_type == "qwen2",
        "qk_layernorm": hf.model_type in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **_sliding_window(hf),
    }


def _mark_tensor_parallel_weights(model: KTOGPTModel) -> None:
    """Mark which dimension of each weight the tensor-parallel ranks share.

    Megatron's own layers do so only while they initialise the weights, which is left out here. Without the marks the
    gradient norm would count the shards of the first tensor-parallel rank only. Transformer Engine marks its layers.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1, stride=1)


@torch.no_grad()
def _clear_vocabulary(model: KTOGPTModel) -> None:
    """Set embedding and output layer to zero, the padding rows for good if a checkpoint has fewer of them.

    Their logits are masked, but NaN left in memory would reach the gradients: zero times NaN is NaN.
    """
    for parameter in model.parameters():
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            parameter.zero_()


def _sliding_window(hf: PretrainedConfig) -> dict[str, Any]:
    size = getattr(hf, "sliding_window", None)
    if not size or not getattr(hf, "use_sliding_window", True):
        return {}
    # Hugging Face counts the token itself among the `size` visible ones, Megatron only those before it
    fields: dict[str, Any] = {"window_size": (size - 1, 0)}
    layer_types = getattr(hf, "layer_types", None)
    if layer_types:
        fields["window_attn_skip_freq"] = [int(kind == "sliding_attention") for kind in layer_types]
    return fields


def _division(layout: Layout) -> dict[str, Any]:
    """Return the TransformerConfig fields that say how the model is divided."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        # gloo has no batched exchange; with interleaved stages a batch confuses the two directions between two stages
        "batch_p2p_comm": torch.cuda.is_available() and layout.virtual == 1,
    }


def _precision(params_dtype: torch.dtype) -> dict[str, Any]:
    """Return the TransformerConfig fields that say in which dtype it is computed."""
    return {
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
    }


def _execution(recompute: Recompute | None) -> dict[str, Any]:
    """Return the TransformerConfig fields that say how it is computed."""
    on_cuda = torch.cuda.is_available()
    recompute_fields = {} if recompute is None else recompute.transformer_config()
    return {
        **recompute_fields,
        "variable_seq_lengths": True,  # packed rows differ in length
        "moe_token_dispatcher_type": "alltoall",  # Megatron insists on it with variable lengths, experts or not
        "use_cpu_initialization": not on_cuda,
        "perform_initialization": False,  # it would make every full tensor on every rank
        "masked_softmax_fusion": False,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": False,
    }

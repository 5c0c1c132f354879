"""Megatron GPT models described by Hugging Face configurations of the families in `families/`.

Tensor legend: `T` tokens of a packed row, `h` hidden size, `v/t` rows of the padded vocabulary on this rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from transformers import PretrainedConfig

from nemo_kto.algorithms.logprobs import LogitShape
from nemo_kto.network import moe
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.hf_config import check_hf_config
from nemo_kto.network.latent_attention import WholeLinear
from nemo_kto.network.layer_specs import attends_by_document, block_spec, check_transformer_impl
from nemo_kto.network.megatron_config import Recompute, megatron_config
from nemo_kto.network.quantised_weight import weights_quantised
from nemo_kto.network.rotary import RotaryEmbedding
from nemo_kto.network.sharded import Leaf, mark_divided, sharded_leaves
from nemo_kto.network.trained_copies import Copied
from nemo_kto.network.vision import Vision, VisionSettings
from nemo_kto.network.weight_rules import PaddedVocab, Rule, match
from nemo_kto.runtime import megatron_fixes, parallel
from nemo_kto.runtime.layout import Layout, padded_vocabulary

_NORM = re.compile(r"norm(_weight|\.weight)$")
"""What the names of the weights of norms end with."""
_PLAIN_NORM = "gated_norm_weight"
"""That of linear attention, to which one is not added where it is to others."""
VISION_PREFIX = "vision."
"""What the names of the parameters begin with that see images."""


class KTOGPTModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose last stage returns hidden states: the output layer is applied at response positions only.

    The output layer's weight stays an ordinary parameter of the model, so Megatron's gradient hooks, the exchange of
    tied embedding gradients between the first and the last stage and sharded checkpoints are untouched.

    It takes rows of packed documents: `packed_seq_params` in Megatron's format "thd" describes the whole row, also
    under context parallelism, where `input_ids` and `position_ids` are this rank's consecutive part of it.

    Attributes:
        vocab_size: Number of real tokens; rows of the output weight from there on are padding.
        padded_vocab_size: Rows of the embedding over all tensor-parallel ranks.
        hf_config: Its configuration.
        rotary: Its rotary embedding, where attention is `DocumentAttention`; None with Transformer Engine's, which
            takes Megatron's.
        vision: What sees images, beside the embedding; None where that is not, or nothing does.
    """

    def __init__(
        self,
        *args: Any,
        hf_config: PretrainedConfig,
        rotary: RotaryEmbedding | None,
        cp_rank: int,
        vision: Vision | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.vision = vision
        self.hf_config = hf_config
        self.padded_vocab_size: int = self.vocab_size
        self.vocab_size: int = hf_config.vocab_size
        self.rotary = rotary
        self._cp_rank = cp_rank

    @property
    def attends_by_document(self) -> bool:
        """Whether its attention is `DocumentAttention` rather than Transformer Engine's."""
        return self.rotary is not None

    def rules(self) -> list[Rule]:
        """Return its table of weights, of all layers of all stages; of what sees images where that is."""
        of_images = [] if self.vision is None else self.vision.rules(VISION_PREFIX)
        return family_of(self.hf_config).rules(self.hf_config) + of_images

    def frozen_leaves(self) -> Iterable[Leaf]:
        """Return the parameters that `sharded_leaves` leaves out, of what sees images, each whole."""
        return () if self.vision is None else self.vision.frozen_leaves(VISION_PREFIX)

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
        images = getattr(packed_seq_params, "images", None)
        if images is not None and self.pre_process:
            assert self.vision is not None, "the model was built without what sees images"
            input_ids = input_ids.index_fill(1, images.places, 0)  # for the ids there may be no embedding
        described = replace(packed_seq_params, qkv_format="thd")  # else Megatron cuts the table into zigzag parts
        decoder_input, rotary, *rest = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=described, padding_mask=padding_mask, **kwargs
        )
        if decoder_input is not None:
            # As the embedding leaves it, the dimension of the single batch has an odd stride. torch chooses another
            # kernel by it, but in some passes only: in training the policy would not be scored as the reference is.
            decoder_input = decoder_input.view(decoder_input.shape)
            if self.config.embedding_multiplier != 1.0:
                decoder_input = decoder_input * self._embedding_multiplier
            if self.vision is not None:
                decoder_input = self.vision.put_over(
                    decoder_input, images, sequence_parallel=self.config.sequence_parallel
                )
        if self.rotary is not None:
            lengths = self._document_lengths(position_ids[0], packed_seq_params)
            in_images = getattr(packed_seq_params, "rotary_positions", None)
            rotary = self.rotary.table(position_ids[0], lengths, in_images)
        return (decoder_input, rotary, *rest)

    @property
    def _embedding_multiplier(self) -> float:
        config = self.config
        if not config.embedding_multiplier_is_rounded:
            return float(config.embedding_multiplier)
        return torch.tensor(config.embedding_multiplier, dtype=config.params_dtype).item()

    def _document_lengths(self, positions: torch.Tensor, row: PackedSeqParams) -> torch.Tensor:
        """Return how many tokens `[T]` the document of each of this rank's tokens has.

        Where keys and values are kept, a row has the newest token of each document only: its position tells.
        """
        boundaries = row.cu_seqlens_q
        in_row = torch.arange(len(positions), device=positions.device) + self._cp_rank * len(positions)
        documents = torch.bucketize(in_row, boundaries[1:], right=True).clamp_(max=len(boundaries) - 2)
        return torch.maximum(boundaries.diff()[documents], positions + 1)

    def output_weight(self) -> torch.nn.Parameter:
        """Return this rank's shard `[v/t, h]` of the output layer's weight, shared with the embedding if tied."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        # the layer itself is never called: run what Megatron hooks to that, to have the weight gathered first
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        if self.share_embeddings_and_output_weights:
            shared: torch.nn.Parameter = self.shared_embedding_or_output_weight()
            return shared
        if isinstance(self.output_layer, Copied):
            return self.output_layer.weight_in_use()
        weight: torch.nn.Parameter = self.output_layer.weight
        return weight

    @property
    def logit_shape(self) -> LogitShape:
        """What it makes of the products of hidden states and output layer."""
        return LogitShape(self.config.logits_multiplier, self.config.logits_cap)

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
    quantised: str | None = None,
    vision: VisionSettings | None = None,
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
        quantised: In which format the weights of linear layers are kept, experts' included, so that they cannot be
            trained: a key of `quantised_weight.FORMATS`; None for plain numbers.
        vision: What sees images, which the chunk with the embedding gets; None for rows without images.

    Raises:
        ConfigError: The model, `transformer_impl` or the padded vocabulary does not fit.
    """
    check_hf_config(hf_config)
    sizes = dimensions_of(hf_config)
    use_transformer_engine = check_transformer_impl(transformer_impl)
    padded_vocab_size = padded_vocabulary(
        hf_config.vocab_size, multiple=vocab_pad_multiple, tensor_model_parallel_size=layout.tensor
    )
    config = megatron_config(
        hf_config,
        layout,
        params_dtype=params_dtype,
        recompute=recompute,
        grouped_gemm=use_transformer_engine and quantised is None,
        moe_aux_loss_coeff=moe_aux_loss_coeff,
    )
    rotary = RotaryEmbedding(hf_config, sizes.head_channels)
    # of what images need, Transformer Engine's attention and Megatron's rotary embedding know nothing
    for_images = vision is not None and (rotary.has_sections or config.images_see_themselves)
    by_document = attends_by_document(config, use_transformer_engine) or rotary.is_beyond_megatron or for_images
    # for what `DocumentAttention` takes a function of `algorithms/pointwise.py`, see `keep_less_for_backward`; for
    # Transformer Engine's rows its own kernel, as Megatron would ask the device for the documents' lengths
    config.apply_rope_fusion = by_document or megatron_fixes.has_rotary_kernel_for_rows()
    place = parallel.position()
    chunk_number = chunk if layout.virtual > 1 else None
    layers = block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        by_document=by_document,
        chunk=chunk_number,
        unfused=unfused or quantised is not None,
        own_experts=quantised is not None,
    )
    pre_process = place.is_first_stage and chunk == 0
    with weights_quantised(quantised, (ColumnParallelLinear, RowParallelLinear, WholeLinear), until=TransformerBlock):
        model = KTOGPTModel(
            config,
            layers,
            hf_config=hf_config,
            rotary=rotary if by_document else None,
            cp_rank=place.cp_rank,
            vision=Vision(vision, params_dtype) if vision is not None and pre_process else None,
            vocab_size=padded_vocab_size,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=place.is_last_stage and chunk == layout.virtual - 1,
            parallel_output=True,
            position_embedding_type="none" if by_document else "rope",
            rotary_percent=2 * len(rotary.inverse_frequencies) / sizes.head_channels,
            share_embeddings_and_output_weights=sizes.tied,
            vp_stage=chunk_number,
        )
    mark_tensor_parallel_weights(model)
    moe.mark_expert_weights(model)
    moe.add_expert_biases(model)
    moe.freeze_router_biases(model, config)
    _clear_vocabulary(model)
    if not by_document:
        # of the kinds of scaling Megatron knows few, and those not in full; the frequencies say everything
        model.rotary_pos_emb.inv_freq = rotary.inverse_frequencies
    return model.to(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else model


@torch.no_grad()
def initialize_weights(model: KTOGPTModel, *, seed: int, std: float) -> None:
    """Fill the weights with random numbers that depend on `seed` only, never on the layout.

    Matrices are normal with mean 0 and standard deviation `std`, norms multiply by one, biases and padding rows are
    zero. Each full tensor is drawn in float32 from a generator of its own, seeded by (`seed`, its name), and sliced:
    one at a time.
    """
    rules = model.rules()
    norm = 0.0 if model.config.layernorm_zero_centered_gamma else 1.0
    for leaf in sharded_leaves(model):
        layout = match(rules, leaf.key).layout
        if len(leaf.global_shape) == 1:
            plain = 1.0 if leaf.key.endswith(_PLAIN_NORM) else norm
            leaf.data.fill_(plain if _NORM.search(leaf.key) else 0.0)
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


def mark_tensor_parallel_weights(model: torch.nn.Module) -> None:
    """Mark which dimension of each parameter the tensor-parallel ranks share.

    Without the marks the gradient norm would count the shards of the first tensor-parallel rank only. Megatron's own
    layers mark their weights only while they initialise them, which is left out here; Transformer Engine's do so by
    versions: nothing is left to them.
    """
    for module in model.modules():
        mode = getattr(module, "parallel_mode", None)  # of Transformer Engine's linear layers
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear) or mode == "column":
            shared = {"weight": 0, "bias": 0}
        elif isinstance(module, RowParallelLinear) or mode == "row":
            shared = {"weight": 1}
        else:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name in shared:
                mark_divided(parameter, dim=shared[name])


@torch.no_grad()
def _clear_vocabulary(model: KTOGPTModel) -> None:
    """Set embedding and output layer to zero, the padding rows for good if a checkpoint has fewer of them.

    Their logits are masked, but NaN left in memory would reach the gradients: zero times NaN is NaN.
    """
    for parameter in model.parameters():
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            parameter.zero_()

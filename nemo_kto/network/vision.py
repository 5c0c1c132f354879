"""What sees images in a model that does: transformers' own modules, on the chunk that has the embedding.

Every rank of the first stage has them whole. They are run for one image at a time, so that what they make of it does
not depend on which others are in its row: then policy and reference have the same of it, to the last bit.

Tensor legend: `I` tokens that stand for the images of a row, `n` tokens of one image, `T` tokens of the row on this
rank, `h` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from transformers import AutoModel, PretrainedConfig
from transformers.initialization import no_init_weights

from nemo_kto.data.batches.row_images import Picture, RowImages
from nemo_kto.data.batches.upload import upload
from nemo_kto.errors import ConfigError
from nemo_kto.network.family import whole_of
from nemo_kto.network.sharded import Leaf
from nemo_kto.network.weight_rules import Piece, Rule
from nemo_kto.runtime import parallel

PROJECTORS = {
    "gemma3": "multi_modal_projector",
    "llava": "multi_modal_projector",
    "qwen2_5_vl": "visual.merger",
}
"""Models that can be trained on images (`model_type`) -> what makes hidden states of the language model of what the
rest has seen."""

TRAIN = ("none", "projector", "all")
"""Values of `model.vision.train`."""

_TOWERS = ("clip_vision_model", "siglip_vision_model", "qwen2_5_vl_vision")

_ATTENTION = "sdpa"
"""Torch's kernels, which a test holds to the same bits with and without gradients."""

_LEVELS = ("vision_tower.", "vision_tower.vision_model.")
"""What begins the names of CLIP's and SigLIP's parameters in transformers' modules, and before version 5 in files."""


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """What sees images, and what is trained of it.

    Attributes:
        config: Configuration of the whole model, from `hf_config.whole_config`.
        train: `none`, `projector` or `all`.
    """

    config: PretrainedConfig
    train: str = "none"


def can_see(hf_config: Any) -> bool:
    """Return whether the model, of whose language model this is the configuration, can be trained on images here."""
    return whole_of(hf_config) in PROJECTORS


class Vision(torch.nn.Module):
    """What makes hidden states of the language model of images.

    Dropout is off, also in training.

    Args:
        settings: Which model, and what is trained of it.
        dtype: Dtype of parameters and hidden states.

    Attributes:
        tower: transformers' model without its language model, and with something else for its projector, whose
            `get_image_features` then returns what the projector takes.
        projector: Its projector.

    Raises:
        ConfigError: The model sees images by something that is not supported.
    """

    def __init__(self, settings: VisionSettings, dtype: torch.dtype) -> None:
        super().__init__()
        config, self._train = settings.config, settings.train
        sees = config.vision_config.model_type
        if config.model_type not in PROJECTORS or sees not in _TOWERS:
            raise ConfigError(
                f"{config.name_or_path or 'the model'}: a {config.model_type} with a {sees} cannot be given images. "
                f"Supported are {', '.join(PROJECTORS)}, with {', '.join(_TOWERS)}."
            )
        self._at = PROJECTORS[config.model_type]
        self.tower = _without_language_model(config, dtype)
        self.projector = self.tower.get_submodule(self._at)
        self._fold = config.model_type == "qwen2_5_vl"
        patches = config.vision_config.spatial_merge_size**2 if self._fold else 1
        self.tower.set_submodule(self._at, _Gathered(patches))
        self._dtype = dtype
        self._channels = config.vision_config.hidden_size
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_of: tuple[tuple[int, int], ...] = ()
        self.requires_grad_(False)
        if self._train == "projector":
            self.projector.requires_grad_(True)
        elif self._train == "all":
            unused = _without_effect(config)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(self.source_name(name) not in unused)
        self.eval()

    def train(self, mode: bool = True) -> Vision:
        """Stay in the mode of evaluation."""
        return super().train(False)

    @property
    def trains(self) -> bool:
        """Whether anything of it is trained."""
        return self._train != "none"

    def forget(self) -> None:
        """Forget what is kept of images."""
        self._kept.clear()

    def features(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Return what the language model takes for images, one behind the other, `[I, h]` in the parameters' dtype.

        What frozen parameters make of an image is kept until `forget`, or until those parameters are others.

        Raises:
            ConfigError: An image has another number of tokens than it has in the row.
        """
        self._forget_if_changed()
        found: dict[int, torch.Tensor] = {}
        for picture in pictures:
            if picture.key not in found:
                found[picture.key] = self._feature(picture)
        return torch.cat([found[picture.key] for picture in pictures])

    def put_over(self, embedded: torch.Tensor, images: RowImages | None, *, sequence_parallel: bool) -> torch.Tensor:
        """Return the embedding of a row with images where it has tokens that stand for them.

        Args:
            embedded: `[T, 1, h]`, or this tensor-parallel rank's part of it with sequence parallelism.
            images: The images of the row; None for none.
            sequence_parallel: Whether each tensor-parallel rank has a part. The gradient of it is gathered in the
                backward pass, so that each has the whole gradient of the parameters here.
        """
        self._complete_parameters()
        if images is None or not len(images.places):
            return self._untouched(embedded)
        chosen = self.features(images.pictures)[images.features]
        tokens = len(embedded) * (parallel.position().tp_group.size() if sequence_parallel else 1)
        over = chosen.new_zeros(tokens, 1, chosen.shape[1]).index_copy(0, images.places, chosen[:, None])
        is_image = torch.zeros(tokens, 1, 1, dtype=torch.bool, device=over.device).index_fill(0, images.places, True)
        if sequence_parallel:
            over, is_image = scatter_to_sequence_parallel_region(over), scatter_to_sequence_parallel_region(is_image)
        return torch.where(is_image, over, embedded)

    def _feature(self, picture: Picture) -> torch.Tensor:
        """Return what the language model takes for an image, `[n, h]`."""
        if self._train == "all":
            found = self._projected(self._seen(picture))
        else:
            if picture.key not in self._kept:
                with torch.no_grad():
                    seen = self._seen(picture)
                    self._kept[picture.key] = seen if self.trains else self._projected(seen)
            kept = self._kept[picture.key]
            found = self._projected(kept) if self.trains else kept
        if len(found) != picture.num_tokens:
            raise ConfigError(
                f"An image has {picture.num_tokens} tokens in its prompt, and is {len(found)} to the model. The "
                "model's config.json and the files that say how images are prepared (preprocessor_config.json, "
                "processor_config.json) do not belong together."
            )
        return found

    def _seen(self, picture: Picture) -> torch.Tensor:
        """Return what the projector takes for an image."""
        device = next(self.parameters()).device
        moved = dict(zip(picture.inputs, upload(list(picture.inputs.values()), device), strict=True))
        inputs = {name: each.to(self._dtype) if each.is_floating_point() else each for name, each in moved.items()}
        seen: torch.Tensor = torch.cat(list(self.tower.get_image_features(**inputs, return_dict=True).pooler_output))
        return seen

    def _projected(self, seen: torch.Tensor) -> torch.Tensor:
        """Return `[n, h]` of what `_seen` returned of an image."""
        found: torch.Tensor = (
            self.projector(seen.view(-1, self._channels)) if self._fold else self.projector(seen[None])[0]
        )
        return found

    def _forget_if_changed(self) -> None:
        """Forget what was kept if the frozen parameters have other contents since: those of a reference."""
        if self._train == "all":
            return
        frozen = tuple(
            (each.untyped_storage()._cdata, each._version) for each in self.parameters() if not each.requires_grad
        )
        if frozen != self._kept_of:
            self.forget()
            self._kept_of = frozen

    def _untouched(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return an embedding without images, of which trained parameters have a gradient, of zeros.

        With `overlap_grad_sync` Megatron waits for the gradients of all.
        """
        if not self.trains or not torch.is_grad_enabled():
            return embedded
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found: torch.Tensor = _Untouched.apply(embedded, *trained)  # type: ignore[no-untyped-call]
        return found

    def _complete_parameters(self) -> None:
        """Run what Megatron hooks to calls of modules, to have their weights gathered first.

        On all ranks in the same order: also where a row has no images.
        """
        for module in self.modules() if self.trains else ():
            for hook in module._forward_pre_hooks.values():
                hook(module, ())

    # parameters

    def source_name(self, name: str) -> str:
        """Return what transformers calls a parameter of this module, within its model."""
        module, _, rest = name.partition(".")
        return f"{self._at}.{rest}" if module == "projector" else rest

    def rules(self, prefix: str) -> list[Rule]:
        """Return which tensors of a folder become its parameters, whose names begin with `prefix` in Megatron's."""
        found = []
        for name, parameter in self.named_parameters():
            first, *others = (Piece(each, tuple(parameter.shape)) for each in _namings(self.source_name(name)))
            found.append(Rule(prefix + name, (replace(first, elsewhere=tuple(others)),)))
        return found

    def frozen_leaves(self, prefix: str) -> Iterator[Leaf]:
        """Yield the parameters that `sharded_state_dict` leaves out."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                region = tuple(slice(0, size) for size in parameter.shape)
                yield Leaf(prefix + name, tuple(parameter.shape), region, parameter.data)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the trained parameters in Megatron's form: the frozen ones are in the folder of the model."""
        assert metadata is not None
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad},
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel.position().tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return found


class _Gathered(torch.nn.Module):
    """Joins the channels of neighbouring patches, which a projector makes one token of.

    Args:
        patches: How many.
    """

    def __init__(self, patches: int) -> None:
        super().__init__()
        self._patches = patches

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        """Return `[tokens, patches * channels]` of `[tokens * patches, channels]`; the same for one patch."""
        return seen if self._patches == 1 else seen.view(-1, self._patches * seen.shape[-1])


class _Untouched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


def _without_language_model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Return transformers' model without output layer and language model, its parameters without contents."""
    settled = copy.deepcopy(config)
    # what is left out is made as small as can be; the projector takes its width from it
    text = settled.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    if hasattr(text, "layer_types"):
        text.layer_types = []
    with no_init_weights():
        model = AutoModel.from_config(settled, attn_implementation=_ATTENTION, dtype=dtype)
    del model.language_model
    return model


def _namings(name: str) -> tuple[str, ...]:
    """Return what folders call a parameter that transformers calls so, the name that it is published with first."""
    level, published = _LEVELS
    plain = name.replace(published, level) if name.startswith(published) else name
    return (plain.replace(level, published), plain) if plain.startswith(level) else (name,)


def _without_effect(config: PretrainedConfig) -> frozenset[str]:
    """Return the parameters that the features of an image do not depend on, such as the layers behind the one taken.

    They have no gradient, and nothing is to change them: not a decay of weights either.
    """
    sees = config.vision_config
    if not hasattr(sees, "image_size"):
        return frozenset()  # Qwen's has none
    with torch.device("meta"):
        model = _without_language_model(config, torch.float32)
        pixels = torch.zeros(1, sees.num_channels, sees.image_size, sees.image_size)
    features = torch.cat(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return frozenset(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)

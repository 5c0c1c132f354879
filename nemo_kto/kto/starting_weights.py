"""The weights that policy and reference start from, and how they get into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_kto.algorithms.finite import first_not_finite
from nemo_kto.errors import CheckpointError
from nemo_kto.kto.reference import EXCHANGED, AdapterOffReference, LiveReference, ReferenceSettings
from nemo_kto.network.gpt import VISION_PREFIX, KTOGPTModel, initialize_weights
from nemo_kto.network.lora import clear_adapters, initialize_adapters
from nemo_kto.network.moe import router_biases
from nemo_kto.network.sharded import ADAPTERS
from nemo_kto.weights.import_hf import import_hf
from nemo_kto.weights.peft_adapter import import_adapter


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where weights come from; the methods take this rank's chunks, not wrapped.

    Attributes:
        model_folder: Hugging Face folder of the model that training starts from; None for random weights.
        adapter_folder: PEFT folder of the adapters that training starts from; None for random A and B = 0.
        seed: Seed of random weights.
        init_std: Their standard deviation; adapters have their own.
        has_adapters: Whether adapters are trained, not the model.
        reference: The reference.
    """

    model_folder: Path | None
    adapter_folder: Path | None
    seed: int
    init_std: float
    has_adapters: bool
    reference: ReferenceSettings

    def load_policy(self, models: Sequence[KTOGPTModel]) -> None:
        """Put everything that training starts from into the models."""
        self.load_model(models)
        self.load_adapters(models)
        _check_finite(models, model_folder=self.model_folder, adapter_folder=self.adapter_folder)

    def load_model(self, models: Sequence[KTOGPTModel]) -> None:
        """Put the weights that training starts from into the models, adapters apart."""
        for model in models:
            if self.model_folder is None:
                initialize_weights(model, seed=self.seed, std=self.init_std)
            else:
                import_hf(model, self.model_folder)

    def load_adapters(self, models: Sequence[KTOGPTModel]) -> None:
        """Put those adapters into the models that training starts from, if there are any."""
        for model in models if self.has_adapters else ():
            if self.adapter_folder is None:
                initialize_adapters(model, seed=self.seed)
            else:
                import_adapter(model, self.adapter_folder)

    def load_reference(self, models: Sequence[KTOGPTModel]) -> None:
        """Put the reference into models that hold the weights training starts from."""
        for model in models:
            if self.reference.model_folder is not None:
                import_hf(model, self.reference.model_folder)
            if self.reference.adapter_folder is not None:
                import_adapter(model, self.reference.adapter_folder)
            elif self.has_adapters:
                clear_adapters(model)
        reference = self.reference
        folder = reference.model_folder or self.model_folder
        _check_finite(models, model_folder=folder, adapter_folder=reference.adapter_folder)

    def restore_policy(self, models: Sequence[KTOGPTModel]) -> None:
        """Undo `load_reference`."""
        if self.reference.model_folder is not None:
            self.load_model(models)
        self.load_adapters(models)

    def live_reference(self, models: Sequence[KTOGPTModel]) -> LiveReference:
        """Return the reference for models that hold the weights training starts from."""
        if self.reference.mode == "adapter_off":
            return AdapterOffReference(models)
        everything = self.reference.model_folder is not None or not self.has_adapters
        same_eyes = self.reference.model_folder is None
        exchanged = [
            parameter
            for model in models
            for name, parameter in model.named_parameters()
            # what sees images and is frozen is the same in both, and what it makes of an image is kept
            if parameter.requires_grad or (everything and not (same_eyes and name.startswith(VISION_PREFIX)))
        ]
        if everything:
            exchanged += [bias for model in models for bias in router_biases(model)]
        reference = EXCHANGED[self.reference.mode](exchanged)
        with reference.activated():
            self.load_reference(models)
        return reference


def _check_finite(models: Sequence[KTOGPTModel], *, model_folder: Path | None, adapter_folder: Path | None) -> None:
    """Raise a CheckpointError for a weight that its file holds as a finite number, and its dtype does not."""
    name = first_not_finite(item for model in models for item in model.named_parameters())
    if name is not None:
        raise CheckpointError(
            f"{adapter_folder if ADAPTERS in name else model_folder}: the values of {name} are not finite in "
            f"{models[0].config.params_dtype}. Use trainer.precision=bf16-mixed or 32."
        )

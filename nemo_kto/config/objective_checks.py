"""What `model.kto` and the micro-batches may not be together."""

from __future__ import annotations

from nemo_kto.config.plugins import LOSSES
from nemo_kto.config.schema import KTOConfig, KTOLossConfig, ModelConfig
from nemo_kto.errors import ConfigError

_WITHOUT_KL_SET = ("apo_zero_unpaired", "bco")
"""Values of `model.kto.loss` whose baseline is not formed from a KL set."""


def has_kl_set(kto: KTOLossConfig) -> bool:
    """Return whether the loss is given a baseline from the KL set."""
    return kto.loss not in _WITHOUT_KL_SET


def kl_group_size(model: ModelConfig) -> int | None:
    """Return how many consecutive samples have a KL set and a baseline of their own; None: a whole global batch."""
    return model.micro_batch_size if model.kto.kl_scope == "micro_batch" else None


def check_objective(config: KTOConfig) -> None:
    """Raise a ConfigError for an objective, or micro-batches that it depends on, that make no sense."""
    _check_loss(config.model.kto)
    _check_loss_weights(config.model.kto)
    _check_kl_set(config.model.kto)
    _check_micro_batches(config.model)
    _check_monitor(config)


def _check_micro_batches(model: ModelConfig) -> None:
    if model.micro_batch_tokens is None:
        if kl_group_size(model) == 1:
            raise ConfigError(
                f"model.kto.kl_scope={model.kto.kl_scope} pairs each prompt with another sample's response of its "
                "micro-batch, and with model.micro_batch_size=1 there is none. Raise it, or use kl_scope=global_batch."
            )
        return
    given = f"model.micro_batch_tokens={model.micro_batch_tokens}"
    if model.micro_batch_size != 1:
        raise ConfigError(f"{given} stands in the place of model.micro_batch_size={model.micro_batch_size}. Use one.")
    if model.kto.log_prob_forward_micro_batch_size is not None:
        raise ConfigError(
            f"{given} is for all passes; model.kto.log_prob_forward_micro_batch_size="
            f"{model.kto.log_prob_forward_micro_batch_size} cannot be used with it. Leave it out."
        )
    if model.moe_aux_loss_coeff:
        raise ConfigError(
            f"{given} makes micro-batches that depend on the layout, and model.moe_aux_loss_coeff="
            f"{model.moe_aux_loss_coeff} is a function of a micro-batch. Use model.micro_batch_size."
        )
    if model.kto.kl_scope != "global_batch":
        raise ConfigError(
            f"{given} makes micro-batches of any number of samples, and model.kto.kl_scope={model.kto.kl_scope} would "
            "make the result depend on them. Use model.micro_batch_size or kl_scope=global_batch."
        )


def _check_loss(kto: KTOLossConfig) -> None:
    prefix = "model.kto."
    if kto.loss not in LOSSES and "." not in kto.loss:
        raise ConfigError(
            f"{prefix}loss={kto.loss!r} is not possible. It takes {', '.join(LOSSES)}, or the dotted path of a "
            "function such as my_package.my_loss."
        )
    if not has_kl_set(kto):
        without = f"cannot be used with {prefix}loss={kto.loss}, which has no KL set. Leave it out."
        if kto.kl_scope != "global_batch":
            raise ConfigError(f"{prefix}kl_scope={kto.kl_scope} {without}")
        if kto.kl_fraction != 1:
            raise ConfigError(f"{prefix}kl_fraction={kto.kl_fraction} {without}")
        if kto.log_prob_forward_micro_batch_size is not None:
            size = kto.log_prob_forward_micro_batch_size
            raise ConfigError(f"{prefix}log_prob_forward_micro_batch_size={size} {without}")
    if kto.humanline_clamp is not None:
        clamp = f"{prefix}humanline_clamp={kto.humanline_clamp}"
        if len(kto.humanline_clamp) != 2 or not kto.humanline_clamp[0] < 0 < kto.humanline_clamp[1]:
            raise ConfigError(f"{clamp} must be a number below 0 and one above, such as [-1.0, 1.5].")
        if kto.loss != "kto":
            raise ConfigError(f"{clamp} is a variant of {prefix}loss=kto; it cannot be used with {kto.loss}.")
        if kto.reference.mode == "cached":
            raise ConfigError(
                f"{clamp} needs the reference's log-prob of every token; {prefix}reference.mode=cached keeps their "
                "sums only. Use auto."
            )
    every = kto.reference.sync_every_n_steps
    if kto.loss == "bco" and every is not None:
        raise ConfigError(
            f"{prefix}reference.sync_every_n_steps={every} cannot be used with {prefix}loss=bco: its reward shift is "
            "a mean over all steps, of rewards against one reference. Leave it out."
        )


def _check_kl_set(kto: KTOLossConfig) -> None:
    prefix = "model.kto."
    if not 0 < kto.kl_fraction <= 1:
        raise ConfigError(f"{prefix}kl_fraction={kto.kl_fraction} must be above 0 and at most 1.")
    if kto.kl_fraction != 1 and kto.kl_scope != "global_batch":
        raise ConfigError(
            f"{prefix}kl_fraction={kto.kl_fraction} leaves micro-batches without a KL set, which {prefix}kl_scope="
            f"{kto.kl_scope} needs. Use kl_scope=global_batch or kl_fraction=1."
        )


def _check_monitor(config: KTOConfig) -> None:
    monitor, loss = config.exp_manager.checkpoint_callback_params.monitor, config.model.kto.loss
    if monitor == "val_kl" and not has_kl_set(config.model.kto):
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor=val_kl cannot be used with model.kto.loss={loss}, which "
            "has no KL set. Use val_loss."
        )


def _check_loss_weights(kto: KTOLossConfig) -> None:
    if kto.desirable_loss_weight == kto.undesirable_loss_weight == 0 and not kto.sft_loss_weight:
        raise ConfigError(
            "model.kto.desirable_loss_weight and undesirable_loss_weight are both 0: there is nothing to learn. "
            "Raise one of them."
        )
    for one, other in (("desirable", "undesirable"), ("undesirable", "desirable")):
        if getattr(kto, f"{one}_loss_weight") == 0 and getattr(kto, f"{other}_loss_weight") == "auto":
            raise ConfigError(
                f"model.kto.{other}_loss_weight=auto cannot balance model.kto.{one}_loss_weight=0. Set a number."
            )

"""What a configuration means for the data, and what the data means for the loss weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from nemo_kto.algorithms.class_weights import balanced_weights, is_balanced, weighted_ratio
from nemo_kto.config.folders import log_directory, model_folder
from nemo_kto.config.objective_checks import kl_group_size
from nemo_kto.config.schema import KTOConfig, ModelConfig
from nemo_kto.data.batches.datamodule import DataSettings, KTODataModule
from nemo_kto.data.batches.dealing import Division
from nemo_kto.errors import ConfigError, DataError
from nemo_kto.generation.rows import Prompt
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runs.layout import kl_fraction
from nemo_kto.runs.records import check_named, image_tokens, sources, tokenization_settings

logger = logging.getLogger(__name__)

_SHOWN = 80
"""Characters of a text that a message quotes."""


def read_data(
    config: KTOConfig, tokenizer: PreTrainedTokenizerBase, *, max_positions: int, vocab_size: int, trains: bool = True
) -> KTODataModule:
    """Return the data of the run, read and tokenised.

    Args:
        config: The configuration.
        tokenizer: The tokenizer.
        max_positions: The longest document the model is defined for, in tokens.
        vocab_size: Number of tokens the model has; the tokenizer may have others, as long as no record does.
        trains: Whether there has to be data to train on; otherwise, to validate on.

    Raises:
        ConfigError: There is none, or what is said about it is impossible.
        DataError: It cannot be used.
    """
    model, data = config.model, config.model.data
    check_named(data, trains=trains)
    if data.prompt_template and "\\n" in data.prompt_template and is_global_rank_zero():
        logger.warning(
            "model.data.prompt_template=%s has a backslash and an n in it, not a line break. In bash, write the whole "
            "argument as $'...'.",
            data.prompt_template,
        )
    folder = model_folder(config)
    settings = DataSettings(
        train=sources(data, data.data_prefix.train or ()),
        validation=sources(data, data.data_prefix.validation or ()),
        validation_fraction=data.validation_fraction,
        tokenization=tokenization_settings(data),
        images=None if folder is None else image_tokens(folder),
        max_length=min(data.seq_length, max_positions),
        max_positions=max_positions,
        overlong=data.overlong,
        on_bad_record=data.on_bad_record,
        cache_dir=Path(data.cache_dir or log_directory(config) / "tokens").absolute(),
        tokenize_workers=data.tokenize_workers,
        global_batch_size=model.global_batch_size,
        kl_fraction=kl_fraction(model.kto),
        kl_group_size=kl_group_size(model),
        division=_division(model),
        shuffle=data.shuffle,
        seed=model.seed,
        num_workers=data.num_workers,
    )
    module = KTODataModule(settings, tokenizer)
    module.prepare()
    if highest_token_id(tokenizer) >= vocab_size:
        _check_tokens(module, tokenizer, vocab_size)
    for split, samples in module.splits.items():
        own = module.own_prompt_pairs(split)
        if own and is_global_rank_zero():
            logger.warning(
                "%s data: the KL response of %d of %d samples is one to their own prompt, which says little about KL: "
                "with model.kto.kl_scope=micro_batch it is, as in TRL, that of the sample before in the micro-batch, "
                "whatever its prompt. model.kto.kl_scope=global_batch avoids it%s.",
                split,
                own,
                len(samples),
                "" if split == "validation" or data.shuffle else ", model.data.shuffle=true makes it rare",
            )
    return module


def highest_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest number a tokenizer gives to a token, which may be more than it has tokens."""
    return max(tokenizer.get_vocab().values())


def _check_tokens(module: KTODataModule, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a DataError for the first sample with a token that the model does not have."""
    for split, samples in module.splits.items():
        for number, store in enumerate(samples.stores):
            beyond = np.flatnonzero(store.tokens >= vocab_size)
            if module.image_token_id is not None:  # no embedding is asked for what stands for images
                beyond = beyond[store.tokens[beyond] != module.image_token_id]
            mine = np.flatnonzero(samples.store_of == number)
            rows = store.samples[samples.place[mine]]
            middle = rows["start"] + rows["prompt"]
            ends = np.searchsorted(beyond, middle + samples.response_kept[mine])
            starts = np.searchsorted(beyond, middle - samples.prompt_kept[mine])
            bad = np.flatnonzero(ends > starts)
            if len(bad):
                names, file_of = module.files_of(split)
                token = int(store.tokens[beyond[starts[bad[0]]]])
                prompt = tokenizer.decode(samples[int(mine[bad[0]])].prompt)
                raise DataError(
                    f"{split} data: {names[file_of[mine[bad[0]]]]}: {len(bad)} samples hold tokens that the model "
                    f"lacks, such as {tokenizer.convert_ids_to_tokens(token)!r}, number {token}; its numbers end at "
                    f"{vocab_size - 1}. Use the tokenizer that belongs to the model, or take such tokens out of the "
                    f"data. The first of the samples begins {prompt[:_SHOWN]!r}."
                )


def _division(model: ModelConfig) -> Division:
    return Division(
        micro_batch_size=model.micro_batch_size,
        kl_micro_batch_size=model.kto.log_prob_forward_micro_batch_size or model.micro_batch_size,
        micro_batch_tokens=model.micro_batch_tokens,
        # where a result depends on which samples are a micro-batch, those are the same for every layout
        by_length=model.kto.kl_scope == "global_batch" and not model.moe_aux_loss_coeff,
    )


def prompts_to_answer(config: KTOConfig, data: KTODataModule, *, max_positions: int) -> list[Prompt]:
    """Return the first different prompts of the validation data, or of the training data.

    Args:
        config: The configuration, which says how many.
        data: The data of the run.
        max_positions: The longest document the model is defined for; a prompt has to leave room for an answer.
    """
    split = "validation" if "validation" in data.splits else "train"
    samples = data.splits[split]
    wanted, found, seen = config.generation.num_prompts, [], set()
    for index, key in enumerate(samples.prompt_keys.tolist()):
        if len(found) == wanted:
            break
        if key not in seen:
            seen.add(key)
            prompt = samples[index].prompt
            if prompt.numel() < max_positions:
                found.append(
                    Prompt(
                        prompt,
                        data.pictures(split, index),
                        data.image_token_id,
                        data.thumbnails(split, index),
                    )
                )
    return found


def settle_loss_weights(config: KTOConfig, data: KTODataModule) -> KTOConfig:
    """Return the configuration with numbers as loss weights, and warn about numbers that leave the data unbalanced.

    Without training data it is returned as it is; then the weights have to be numbers.
    """
    kto = config.model.kto
    if "train" not in data.splits:
        if "auto" in (kto.desirable_loss_weight, kto.undesirable_loss_weight):
            raise ConfigError(
                "model.kto.desirable_loss_weight=auto and undesirable_loss_weight=auto count the training data, and "
                "there is none. Set model.data.data_prefix.train, or numbers."
            )
        return config
    counts = data.splits["train"].class_totals
    given = {"desirable": kto.desirable_loss_weight, "undesirable": kto.undesirable_loss_weight}
    if counts == (0, 0):
        raise DataError(
            "train data: all samples have weight 0, so there is nothing to learn. Give some a weight above 0."
        )
    if 0 in counts:
        one = "desirable" if counts[1] == 0 else "undesirable"
        if is_global_rank_zero():
            logger.warning("All samples that count are %s: KTO learns more from data with both kinds.", one)
        weights = [1.0 if weight == "auto" else weight for weight in given.values()]
    else:
        weights = balanced_weights(*counts, *(None if weight == "auto" else weight for weight in given.values()))
        if "auto" in given.values() and is_global_rank_zero():
            logger.info("Loss weights: %.4g for desirable and %.4g for undesirable samples", *weights)
        _warn_about_weights(counts, weights)
    desirable, undesirable = weights
    kto = replace(kto, desirable_loss_weight=desirable, undesirable_loss_weight=undesirable)
    return replace(config, model=replace(config.model, kto=kto))


def _warn_about_weights(counts: tuple[float, float], weights: tuple[float, float]) -> None:
    ratio = weighted_ratio(*counts, *weights)
    if is_balanced(ratio) or 0 in weights or not is_global_rank_zero():  # a weight of 0 is no oversight
        return
    logger.warning(
        "%.10g desirable samples with weight %.4g and %.10g undesirable ones with weight %.4g: the weighted ratio "
        "is %.3g, and the KTO paper advises one from 1 to 4/3. For that, write\n"
        "    model.kto.desirable_loss_weight=%.4g\n    model.kto.undesirable_loss_weight=%.4g",
        counts[0],
        weights[0],
        counts[1],
        weights[1],
        ratio,
        *balanced_weights(*counts),
    )

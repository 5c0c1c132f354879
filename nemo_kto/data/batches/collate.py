"""`kto_custom_collate`, NeMo-Aligner's public batch form, for scripts that build their own loaders.

Keys, shapes and padding are those of NeMo-Aligner's `nemo_aligner/algorithms/kto.py` (af2b3bd96a). The trainer of this
package works on packed rows instead (`packed_rows.py`).

Shapes: `b` samples, `s` tokens of the longest sequence in the batch, `p` / `r` tokens of one prompt / response.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_kto.data.batches.sampling import mismatch_permutation
from nemo_kto.data.tokens.tokenization import TokenizedSample, prompt_key
from nemo_kto.errors import ConfigError, DataError

IGNORE_INDEX = -100
"""Label of every token that is no response token."""

_ITEM_FIELDS = ("prompt_tokens", "response_tokens", "sample_length", "sample_labels", "preference")


def collate_item(sample: TokenizedSample) -> dict[str, Any]:
    """The sample as the kind of item `kto_custom_collate` takes.

    Raises:
        DataError: Its prompt shows images, for which NeMo-Aligner's form has no place.
    """
    if sample.images:
        raise DataError(
            f"kto_custom_collate has no place for images, and the prompt of a sample shows {len(sample.images)}. "
            "Use the batches of KTODataModule, or samples without images."
        )
    return {
        "prompt_tokens": sample.prompt,
        "response_tokens": sample.response,
        "sample_length": sample.prompt.numel() + sample.response.numel(),
        "sample_labels": _labels(sample.prompt, sample.response),
        "preference": int(sample.desirable),
    }


def kto_custom_collate(
    batch: Sequence[Mapping[str, Any]],
    eos_id: int,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
    pad_length_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Joins samples into right-padded tensors and makes the KL set from them.

    The KL set pairs each prompt with the response of the next sample, as in NeMo-Aligner, unless that is a response to
    the same prompt: see `mismatch_permutation`. Labels are not shifted: `sample_labels[i, j]` is `samples[i, j]` or
    -100.

    Args:
        batch: b items with `prompt_tokens` [p] int64, `response_tokens` [r] int64, `sample_length` (p + r),
            `sample_labels` [p + r] int64 and `preference` (1 chosen, 0 rejected).
        eos_id: Id that tokens are padded with, and that ends a document for the three options below.
        reset_position_ids: Count positions anew after each EOS token.
        reset_attention_mask: Let no token attend across an EOS token.
        eod_mask_loss: Give EOS tokens the label -100.
        pad_length_to_multiple_of: Round s up to a multiple of this.

    Returns:
        `samples`, `kl_samples` [b, s] int64 padded with `eos_id`; `sample_labels`, `kl_sample_labels` [b, s] int64
        padded with -100; `sample_length` [b] int64; `preference` [b] int64; `attention_mask` [b, 1, s, s] bool, True
        where attention is forbidden; `position_ids` [b, s] int64. With one of the reset options, EOS tokens in the
        responses make masks and positions of the KL set differ, and `kl_attention_mask` and `kl_position_ids` are
        given too.

    Raises:
        DataError: The batch is empty or an item lacks a field.
        ConfigError: `pad_length_to_multiple_of` is less than 1.
    """
    _check_arguments(batch, pad_length_to_multiple_of)
    size = len(batch)
    partner = mismatch_permutation([prompt_key(item["prompt_tokens"]) for item in batch])
    pairs = [(item["prompt_tokens"], item["response_tokens"]) for item in batch]
    kl_pairs = [(prompt, pairs[j][1]) for (prompt, _), j in zip(pairs, partner, strict=True)]
    labels = [item["sample_labels"] for item in batch] + [_labels(*pair) for pair in kl_pairs]
    tokens = _pad([torch.cat(pair) for pair in pairs + kl_pairs], eos_id, pad_length_to_multiple_of)
    padded_labels = _pad(labels, IGNORE_INDEX, pad_length_to_multiple_of)
    if eod_mask_loss:
        padded_labels = padded_labels.masked_fill(padded_labels == eos_id, IGNORE_INDEX)
    output = {
        "samples": tokens[:size],
        "kl_samples": tokens[size:],
        "sample_length": torch.tensor([item["sample_length"] for item in batch], dtype=torch.int64),
        "sample_labels": padded_labels[:size],
        "kl_sample_labels": padded_labels[size:],
        "attention_mask": _attention_mask(tokens[:size], eos_id, reset=reset_attention_mask),
        "position_ids": _position_ids(tokens[:size], eos_id, reset=reset_position_ids),
        "preference": torch.tensor([item["preference"] for item in batch], dtype=torch.int64),
    }
    if reset_attention_mask or reset_position_ids:
        output["kl_attention_mask"] = _attention_mask(tokens[size:], eos_id, reset=reset_attention_mask)
        output["kl_position_ids"] = _position_ids(tokens[size:], eos_id, reset=reset_position_ids)
    return output


def _check_arguments(batch: Sequence[Mapping[str, Any]], pad_length_to_multiple_of: int | None) -> None:
    if not batch:
        raise DataError("kto_custom_collate got an empty batch.")
    for index, item in enumerate(batch):
        missing = [field for field in _ITEM_FIELDS if field not in item]
        if missing:
            raise DataError(f"kto_custom_collate: item {index} of the batch lacks {', '.join(missing)}.")
    if pad_length_to_multiple_of is not None and pad_length_to_multiple_of < 1:
        raise ConfigError(f"pad_length_to_multiple_of must be at least 1, got {pad_length_to_multiple_of}.")


def _labels(prompt: Tensor, response: Tensor) -> Tensor:
    """[p + r] the response's ids, with -100 for the prompt."""
    return torch.cat((torch.full_like(prompt, IGNORE_INDEX), response))


def _pad(rows: list[Tensor], value: int, multiple: int | None) -> Tensor:
    """Stacks rows into [b, s], filled up with `value` at the right."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    extra = -padded.shape[1] % (multiple or 1)
    return torch.nn.functional.pad(padded, (0, extra), value=value)


def _document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """[b, s] number of EOS tokens before each token: an EOS token belongs to the document it ends."""
    is_eos = (tokens == eos_id).to(torch.int64)
    return is_eos.cumsum(dim=1) - is_eos


def _attention_mask(tokens: Tensor, eos_id: int, *, reset: bool) -> Tensor:
    """[b, 1, s, s] True where the query (third dim) must not see the key (fourth dim)."""
    size, length = tokens.shape
    forbidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(size, 1, 1)
    if reset:
        documents = _document_ids(tokens, eos_id)
        forbidden |= documents.unsqueeze(2) != documents.unsqueeze(1)
    return forbidden.unsqueeze(1)


def _position_ids(tokens: Tensor, eos_id: int, *, reset: bool) -> Tensor:
    """[b, s] positions counted from 0, or from each token that follows an EOS token."""
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    if reset:
        first = torch.zeros_like(positions)
        first[:, 1:] = torch.where(tokens[:, :-1] == eos_id, positions[:, 1:], 0)
        positions -= first.cummax(dim=1).values
    return positions

"""`kto_custom_collate` has NeMo-Aligner's keys, shapes and padding, and every option works."""

import pytest
import torch

from nemo_kto.data.batches.collate import collate_item, kto_custom_collate
from nemo_kto.data.tokens.tokenization import TokenizedSample, prompt_key
from nemo_kto.errors import ConfigError, DataError

EOS = 9


def item(prompt, response, desirable=True):
    prompt, response = torch.tensor(prompt), torch.tensor(response)
    return collate_item(TokenizedSample(prompt, response, desirable, prompt_key(prompt)))


def three_items():
    return [item([1, 2], [3, 4, EOS]), item([5], [6, EOS], False), item([7], [8])]


def test_item():
    assert {
        name: value.tolist() if hasattr(value, "tolist") else value for name, value in three_items()[1].items()
    } == {
        "prompt_tokens": [5],
        "response_tokens": [6, EOS],
        "sample_length": 3,
        "sample_labels": [-100, 6, EOS],
        "preference": 0,
    }


def test_batch_by_hand():
    batch = kto_custom_collate(three_items(), eos_id=EOS)
    causal = [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "samples": [[1, 2, 3, 4, 9], [5, 6, 9, 9, 9], [7, 8, 9, 9, 9]],
        "kl_samples": [[1, 2, 6, 9, 9], [5, 8, 9, 9, 9], [7, 3, 4, 9, 9]],
        "sample_labels": [[-100, -100, 3, 4, 9], [-100, 6, 9, -100, -100], [-100, 8, -100, -100, -100]],
        "kl_sample_labels": [[-100, -100, 6, 9, -100], [-100, 8, -100, -100, -100], [-100, 3, 4, 9, -100]],
        "sample_length": [5, 3, 2],
        "preference": [1, 0, 1],
        "position_ids": [[0, 1, 2, 3, 4]] * 3,
        "attention_mask": [[causal]] * 3,
    }
    assert {name: value.dtype for name, value in batch.items() if value.dtype != torch.int64} == {
        "attention_mask": torch.bool
    }


def test_both_sets_are_padded_to_the_longest_of_either():
    # Longest sample: 1 + 3. Longest KL pair: prompt of 3, response of 3.
    batch = kto_custom_collate([item([1, 2, 3], [4]), item([5], [6, 7, 8])], eos_id=EOS)
    assert batch["samples"].shape == batch["sample_labels"].shape == (2, 6)
    assert batch["kl_samples"].tolist()[0] == [1, 2, 3, 6, 7, 8]
    assert batch["attention_mask"].shape == (2, 1, 6, 6)


def test_responses_of_one_prompt_do_not_meet():
    pairs = [item([1], [2]), item([1], [3]), item([4], [5]), item([4], [6])]
    assert kto_custom_collate(pairs, eos_id=EOS)["kl_samples"].tolist() == [[1, 6], [1, 5], [4, 3], [4, 2]]


def test_padding_to_a_multiple():
    batch = kto_custom_collate(three_items(), eos_id=EOS, pad_length_to_multiple_of=4)
    assert batch["samples"].tolist()[0] == [1, 2, 3, 4, 9, 9, 9, 9]
    assert batch["kl_sample_labels"].tolist()[0] == [-100, -100, 6, 9, -100, -100, -100, -100]
    assert batch["attention_mask"].shape == (3, 1, 8, 8) and batch["position_ids"].shape == (3, 8)
    same = kto_custom_collate(three_items(), eos_id=EOS, pad_length_to_multiple_of=5)
    assert same["samples"].shape == (3, 5)


def test_eod_mask_loss_takes_eos_out_of_the_labels_only():
    plain = kto_custom_collate(three_items(), eos_id=EOS)
    masked = kto_custom_collate(three_items(), eos_id=EOS, eod_mask_loss=True)
    assert masked["sample_labels"].tolist()[1] == [-100, 6, -100, -100, -100]
    assert masked["kl_sample_labels"].tolist()[0] == [-100, -100, 6, -100, -100]
    assert torch.equal(masked["samples"], plain["samples"])


def test_reset_position_ids():
    batch = kto_custom_collate([item([1, EOS, 2], [3, 4, EOS]), item([5], [6])], eos_id=EOS, reset_position_ids=True)
    assert batch["samples"].tolist()[0] == [1, EOS, 2, 3, 4, EOS]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]]
    assert batch["kl_samples"].tolist() == [[1, EOS, 2, 6, EOS, EOS], [5, 3, 4, EOS, EOS, EOS]]
    assert batch["kl_position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]]
    assert torch.equal(batch["kl_attention_mask"], batch["attention_mask"])


def test_reset_attention_mask():
    batch = kto_custom_collate([item([1, EOS, 2], [3]), item([5], [EOS, 6])], eos_id=EOS, reset_attention_mask=True)
    for tokens, mask in (("samples", "attention_mask"), ("kl_samples", "kl_attention_mask")):
        for row, forbidden in zip(batch[tokens].tolist(), batch[mask], strict=True):
            for query in range(len(row)):
                for key in range(len(row)):
                    crosses = EOS in row[key:query]  # an EOS token at or after the key and before the query
                    assert forbidden[0, query, key] == (key > query or crosses), (row, query, key)
    assert batch["position_ids"].tolist() == batch["kl_position_ids"].tolist() == [list(range(5))] * 2


def test_wrong_arguments():
    with pytest.raises(DataError, match="empty batch"):
        kto_custom_collate([], eos_id=EOS)
    broken = three_items()
    del broken[1]["preference"], broken[1]["sample_labels"]
    with pytest.raises(DataError, match="item 1 of the batch lacks sample_labels, preference"):
        kto_custom_collate(broken, eos_id=EOS)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        kto_custom_collate(three_items(), eos_id=EOS, pad_length_to_multiple_of=0)

"""Tokens of a prompt as at inference, responses that continue them, BOS once, EOS once, nothing cut.

Expected ids come from the `tokenizers` backend, called on single texts.
"""

import pytest
import torch
from conftest import train_byte_level
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemo_kto.data.records import FeedbackRecord
from nemo_kto.data.tokenization import load_tokenizer, prompt_key, tokenize_records
from nemo_kto.errors import ConfigError, DataError

EOS = "</s>"


def record(prompt, response, desirable=True, line=1):
    return FeedbackRecord(prompt, response, desirable, "data.jsonl", line)


def chat(user, assistant, line=1):
    return record([{"role": "user", "content": user}], [{"role": "assistant", "content": assistant}], line=line)


def tokenize(records, tokenizer, *, max_length=1000, append_eod=False):
    return tokenize_records(records, tokenizer, max_length=max_length, append_eod=append_eod)


def one(record, tokenizer, **options):
    """(prompt ids, response ids) of a single record."""
    (sample,) = tokenize([record], tokenizer, **options).samples
    assert sample.prompt.dtype == sample.response.dtype == torch.int64
    return sample.prompt.tolist(), sample.response.tolist()


def ids(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_boundary_without_merge_is_the_joint_tokenisation(tokenizer):
    prompt, response = one(record("say hello", " to the world"), tokenizer)
    assert prompt == ids(tokenizer, "say hello")
    assert prompt + response == ids(tokenizer, "say hello to the world")


def test_boundary_that_would_merge_keeps_the_prompt_of_inference(tokenizer):
    assert len(ids(tokenizer, "hello")) == 1  # the merge across the boundary that the rule is about
    prompt, response = one(record("say hel", "lo world"), tokenizer)
    assert prompt == ids(tokenizer, "say hel")
    assert response == ids(tokenizer, "lo world")


def test_response_that_merges_with_line_breaks(tokenizer):
    newlines = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    newlines.add_tokens(["\n\n"])
    prompt, response = one(record("yes\n", "\nno"), newlines)
    assert newlines.convert_ids_to_tokens(prompt + response) == ["yes", "Ċ", "Ċ", "n", "o"]


def test_no_space_is_put_between_prompt_and_response(metaspace_tokenizer):
    # On its own, "lo" would be tokenised as " lo"; the text must remain "say hello", not "say hel lo".
    prompt, response = one(record("say hel", "lo world"), metaspace_tokenizer)
    assert prompt == ids(metaspace_tokenizer, "say hel")
    assert prompt + response != ids(metaspace_tokenizer, "say hello world")
    assert metaspace_tokenizer.decode(prompt + response) == "say hello world"


def test_records_keep_their_order_and_label(tokenizer):
    texts = ["yes", "hel", "the world", "hel", "say"]
    records = [record(text, "lo", desirable=i % 2 == 0, line=i) for i, text in enumerate(texts)]
    result = tokenize(records, tokenizer)
    assert [sample.prompt.tolist() for sample in result.samples] == [ids(tokenizer, text) for text in texts]
    assert [sample.desirable for sample in result.samples] == [True, False, True, False, True]
    assert (result.num_desirable, result.num_undesirable, result.num_overlong) == (3, 2, 0)


def test_more_records_than_one_chunk(tokenizer):
    result = tokenize([record(f"say {i}", "yes") for i in range(5000)], tokenizer)
    assert len(result.samples) == 5000
    for i in (0, 2047, 2048, 4999):
        assert result.samples[i].prompt.tolist() == ids(tokenizer, f"say {i}")


def test_bos_is_added_to_the_prompt_once(bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    prompt, response = one(record("say", " hello"), bos_tokenizer)
    assert prompt == [bos, *ids(bos_tokenizer, "say")] == bos_tokenizer("say")["input_ids"]
    assert bos not in response


def test_bos_written_in_the_text_is_not_doubled(bos_tokenizer):
    assert one(record("<s>say", " hello"), bos_tokenizer) == one(record("say", " hello"), bos_tokenizer)


def test_bos_is_not_added_by_a_tokenizer_that_adds_none(tokenizer):
    assert tokenizer.bos_token_id is not None
    assert one(record("say", " hello"), tokenizer)[0] == ids(tokenizer, "say")


def test_bos_alone_is_a_prompt(bos_tokenizer, tokenizer):
    assert one(record("", "hello"), bos_tokenizer) == ([bos_tokenizer.bos_token_id], ids(bos_tokenizer, "hello"))
    with pytest.raises(DataError, match="data.jsonl:7: the prompt has no tokens"):
        tokenize([record("", "hello", line=7)], tokenizer)


def test_eos_that_a_tokenizer_appends_is_not_taken_over():
    both = train_byte_level(bos=True, eos_at_end=True)
    assert both("say")["input_ids"][-1] == both.eos_token_id
    prompt, response = one(record("say", " hello"), both)
    assert both.eos_token_id not in prompt + response
    assert prompt[0] == both.bos_token_id


def test_chat_template_decides_about_bos(tokenizer, bos_tokenizer):
    # The template writes no BOS, and a template's text is never given one, at inference neither.
    prompt, response = one(chat("say hello", "hello"), bos_tokenizer)
    expected = bos_tokenizer.apply_chat_template(
        [{"role": "user", "content": "say hello"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == expected
    assert bos_tokenizer.bos_token_id not in prompt + response

    with_bos = train_byte_level(bos=True)
    with_bos.chat_template = "{{ bos_token }}" + with_bos.chat_template
    assert one(chat("say hello", "hello"), with_bos)[0] == [with_bos.bos_token_id, *expected]


def test_chat_response_ends_with_eos_not_with_what_follows_it(tokenizer):
    # The template writes "</s>\n" after a message.
    for append_eod in (False, True):
        _, response = one(chat("say hello", "hello world"), tokenizer, append_eod=append_eod)
        assert response == [*ids(tokenizer, "hello world"), tokenizer.eos_token_id]


def test_multi_turn_prompt(tokenizer):
    turns = [
        {"role": "user", "content": "say hello"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "say yes"},
    ]
    prompt, response = one(record(turns, [{"role": "assistant", "content": "yes"}]), tokenizer)
    assert prompt == ids(
        tokenizer, f"<|user|>say hello{EOS}\n<|assistant|>hello{EOS}\n<|user|>say yes{EOS}\n<|assistant|>"
    )
    assert response == ids(tokenizer, f"yes{EOS}")


def test_messages_without_chat_template(metaspace_tokenizer):
    with pytest.raises(DataError, match="data.jsonl:4: .*no chat template"):
        tokenize([chat("say", "hello", line=4)], metaspace_tokenizer)


def test_a_template_that_asks_for_the_date_gets_a_fixed_one():
    """As Llama 3.2's does; otherwise a run resumed on another day would train on other prompts."""
    dated = train_byte_level()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template
    prompt, _ = one(chat("say", "hello"), dated)
    assert prompt == ids(dated, "26 Jul 2024<|user|>say</s>\n<|assistant|>")


def test_a_template_that_fails():
    failing = train_byte_level()
    failing.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(DataError, match=r"data.jsonl:4: the chat template refuses"):
        tokenize([chat("say", "hello", line=4)], failing)


def test_chat_template_that_refuses(tokenizer):
    refusing = train_byte_level()
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"data.jsonl:4: the chat template refuses .*\(roles must alternate\)"):
        tokenize([chat("say", "hello", line=4)], refusing)


def test_chat_template_whose_prompt_is_no_beginning(tokenizer):
    thinking = train_byte_level()
    thinking.chat_template = thinking.chat_template.replace("<|assistant|>{% endif", "<|assistant|>think{% endif")
    with pytest.raises(DataError, match="data.jsonl:4: the chat template does not render the prompt as the beginning"):
        tokenize([chat("say", "hello", line=4)], thinking)


def test_append_eod(tokenizer):
    plain = one(record("say", " hello"), tokenizer)
    prompt, response = one(record("say", " hello"), tokenizer, append_eod=True)
    assert (prompt, response) == (plain[0], [*plain[1], tokenizer.eos_token_id])
    assert one(record("say", f" hello{EOS}"), tokenizer, append_eod=True) == (prompt, response)


def test_append_eod_without_eos(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert len(one(record("say", " hello"), without)[1]) > 0
    with pytest.raises(ConfigError, match="no EOS token"):
        tokenize([record("say", " hello")], without, append_eod=True)


def test_overlong_records_are_dropped_and_counted_never_cut(tokenizer):
    # "hello" is one token and " hello" another: lengths 2, 3, 4.
    records = [record("hello", " hello" * n) for n in (1, 2, 3)]
    assert [len(sum(one(r, tokenizer), [])) for r in records] == [2, 3, 4]
    for limit, kept in ((4, 3), (3, 2), (2, 1)):
        result = tokenize(records, tokenizer, max_length=limit)
        assert [len(sample.response) for sample in result.samples] == [1, 2, 3][:kept]
        assert result.num_overlong == 3 - kept
    assert tokenize(records, tokenizer, max_length=3, append_eod=True).num_overlong == 2


def test_no_trainable_record_left(tokenizer):
    with pytest.raises(DataError, match="of 2 records none fits into 1 tokens .the shortest has 2 tokens"):
        tokenize([record("hello", " hello" * n) for n in (2, 1)], tokenizer, max_length=1)
    with pytest.raises(DataError, match="No trainable record is left"):
        tokenize([], tokenizer)


def test_response_without_tokens():
    # A tokenizer that knows no unknown token drops what it cannot spell.
    deaf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), bos_token="a")
    with pytest.raises(DataError, match="data.jsonl:9: the response has no tokens"):
        tokenize([record("a", "zzz", line=9)], deaf)


def test_tokenizer_whose_special_tokens_change_the_text():
    class Reversing(PreTrainedTokenizerFast):
        def __call__(self, text, add_special_tokens=True, **options):
            encoded = super().__call__(text, add_special_tokens=False, **options)
            return {"input_ids": encoded["input_ids"][::-1]} if add_special_tokens else encoded

    reversing = Reversing(tokenizer_object=train_byte_level().backend_tokenizer)
    with pytest.raises(ConfigError, match="such tokenizers do not work"):
        tokenize([record("say", " hello world")], reversing)


def test_prompt_key_tells_prompts_apart(tokenizer):
    records = [record("say", " hello"), record("say", " yes"), record("the", " hello")]
    first, same, other = (sample.prompt_key for sample in tokenize(records, tokenizer).samples)
    assert first == same != other


def test_prompt_key_is_stable_and_fits_int64():
    # blake2b of the little-endian int64 bytes of [1, 2], computed with `b2sum -l 64`; shifted right by one bit.
    assert prompt_key(torch.tensor([1, 2])) == int.from_bytes(bytes.fromhex("96a3cf72d606b6a4"), "little") >> 1
    assert prompt_key(torch.tensor([1, 2], dtype=torch.int32)) == prompt_key(torch.tensor([1, 2]))
    assert all(0 <= prompt_key(torch.tensor([i])) < 2**63 for i in range(200))


def test_load_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert one(chat("say hello", "yes"), loaded) == one(chat("say hello", "yes"), tokenizer)
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_load_tokenizer_names_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="has no tokenizer; expected one of tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match=f"{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))

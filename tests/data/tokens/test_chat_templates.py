"""What chat templates do to conversations: parts they leave out, headers that open a block, ends, arguments, dates.

The templates are written here after what models' documentation says theirs do; expected texts are put together by
hand.
"""

import json
import re

import pytest

from nemo_kto.data.reading.records import BadRecord, FeedbackRecord
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.store import add_notes, make_chunk
from nemo_kto.data.tokens.tokenization import Encoder
from nemo_kto.generation.prompts import prompt_tokens, stop_token_ids
from tests.data.conftest import CHAT_TEMPLATE, train_byte_level

HEADER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }} ARGUMENTS]{% endfor %}</s>{% endfor %}" + HEADER
)
OBJECTS = CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
"""As Qwen2.5, Llama 3.1 and Hermes do; a string would become a JSON string inside JSON."""
STRINGS = CALLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}")
"""As DeepSeek V3 does, which refuses an object."""
EITHER = CALLS.replace(
    "ARGUMENTS",
    "{% set a = call.function.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}",
)
"""As Qwen3 does."""
ITEMS = CALLS.replace(
    "ARGUMENTS", "{% for k, v in call.function.arguments.items() %}<k>{{ k }}</k>{{ v }}{% endfor %}"
)
"""As Qwen3-Coder and GLM-4.5 do, which write argument by argument."""
BESIDE = OBJECTS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
"""As Llama 3.1 does, which writes either a text or a call."""
CUTTING = CHAT_TEMPLATE.replace("m['content']", "m['content'][:9]")
NO_THOUGHTS = CHAT_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
"""As DeepSeek R1's distilled models do, with all answers."""
CLOSED = "{% if add_generation_prompt %}<|assistant|></think>{% endif %}"
"""As DeepSeek-V3.1's header does, unless asked to think."""
OPENING = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
"""As R1's and QwQ's headers do."""
CONDITIONAL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}" + HEADER
)
"""As Qwen3 does: the reasoning of earlier turns is left out."""


def made(template, *, eos="</s>", more=()):
    tokenizer = train_byte_level()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(more)})
    tokenizer.eos_token = eos
    return tokenizer


def record(*messages, **more):
    return FeedbackRecord(list(messages[:-1]), [messages[-1]], True, "data.jsonl", 1, **more)


def user(text):
    return {"role": "user", "content": text}


def assistant(text=None, **more):
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def system(text, role="system"):
    return {"role": role, "content": text}


def call(name="add", arguments=None, **message):
    function = {"name": name, "arguments": {"a": 1, "b": "two"} if arguments is None else arguments}
    return assistant(tool_calls=[{"type": "function", "function": function}], **message)


def encoded(tokenizer, *messages, tools=None, template_kwargs=None, **settings):
    sample = record(*messages, tools=tools, template_kwargs=template_kwargs)
    (result,) = Encoder(tokenizer, TokenizationSettings(**settings)).encode([sample])
    return result


def texts(result, tokenizer):
    assert not isinstance(result, BadRecord), result
    return tokenizer.decode(result.prompt), tokenizer.decode(result.response)


def kinds(result):
    return [note.kind for note in result.notes]


# what is left out


def test_a_tool_call_that_becomes_nothing_is_a_bad_record():
    for losses in ("error", "warn"):  # a thumb up for silence teaches silence
        bad = encoded(made(CHAT_TEMPLATE), user("1 + 2?"), call(), template_losses=losses)
        assert isinstance(bad, BadRecord)
        assert bad.reason == (
            'the chat template writes nothing of the answer but its end: it leaves out its tool call, "add".'
        )


@pytest.mark.parametrize(
    ("template", "answer", "part", "rest"),
    [
        (NO_THOUGHTS.replace(HEADER, CLOSED), assistant("<think>Two and two.</think>4"), "its reasoning", "4</s>"),
        (CHAT_TEMPLATE, assistant("4", reasoning_content="Two and two."), "its reasoning", "4</s>"),
        (CHAT_TEMPLATE, assistant("4", thinking="Two and two."), "its reasoning", "4</s>"),
        (BESIDE, call(content="I add."), "the text beside its tool call", '[add {"a": 1, "b": "two"}]</s>'),
        (CALLS.replace(" ARGUMENTS", ""), call(), "its tool call", "[add]</s>"),
        (CHAT_TEMPLATE, call(content="I add."), "its tool call", "I add.</s>"),
        (CUTTING, assistant("one\ntwo\nthree"), "its text", "one\ntwo\nt</s>"),
    ],
)  # fmt: skip
def test_a_part_of_an_answer_that_is_left_out(template, answer, part, rest):
    tokenizer = made(template)
    bad = encoded(tokenizer, user("2 + 2?"), answer)
    assert isinstance(bad, BadRecord) and bad.reason.startswith(f"the chat template leaves {part} out of the answer, ")
    assert "model.data.template_losses=warn" in bad.reason
    kept = encoded(tokenizer, user("2 + 2?"), answer, template_losses="warn")
    assert texts(kept, tokenizer)[1] == rest and f"the chat template leaves out {part}" in kinds(kept)


def test_what_was_lost_is_shown():
    bad = encoded(made(CUTTING), user("?"), assistant("one\ntwo\nthree"))
    assert '"three"' in bad.reason
    bad = encoded(made(NO_THOUGHTS.replace(HEADER, CLOSED)), user("?"), assistant("<think>say </s> now</think>4"))
    assert '"say </s> now"' in bad.reason  # special tokens that people wrote as they wrote them


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim"), assistant("  a\n\n b \n")),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'] | tojson"), assistant('a "b"\n\\c é')),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'].replace('\n', '\n> ')"), assistant("a\nb\nc")),
        (OBJECTS, call(arguments={"list": [1, 2.5, {"deep": "é\n"}], "none": None, "yes": True})),
        (CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}"), call(arguments={"quote": "it's\n", "x": 1e-7})),
        (EITHER, call(arguments="not JSON {")),
        (ITEMS, call()),
        (CONDITIONAL, assistant("<think>a</think>b")),
    ],
)  # fmt: skip
def test_what_is_written_otherwise_is_not_lost(template, message):
    """Trimmed, as JSON or Python writes it, line by line, argument by argument."""
    result = encoded(made(template), user("1 + 2?"), message)
    assert not isinstance(result, BadRecord) and not result.notes, result


def test_a_short_part_is_not_found_in_the_middle_of_another():
    deaf = made(CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'"))
    result = encoded(deaf, system("say"), user("say hello"), assistant("yes, say yes"))
    assert kinds(result) == ["the chat template leaves out the system message"]


def test_parts_of_a_prompt_that_are_left_out_are_counted():
    deaf = made(CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')"))
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}]
    prompt = [
        system("Be brief.", "developer"),
        user("hi"),
        call(content="I add."),
        {"role": "tool", "content": "three"},
    ]
    sample = record(*prompt, user("so?"), assistant("yes"), tools=tools, template_kwargs={"mood": "curt"})
    results = Encoder(deaf, TokenizationSettings()).encode(
        [sample, record(system("Be kind."), user("a"), assistant("b"))]
    )
    assert kinds(results[0]) == [
        "the chat template leaves out the tools' schemas",
        "the chat template leaves out the developer message",
        "the chat template leaves out a tool call of an earlier answer",
        "the chat template leaves out a tool's result",
        "the chat template has no variable 'mood'",
    ]  # fmt: skip
    notes = make_chunk(results).notes
    assert notes["the chat template leaves out the developer message"] == (1, 'data.jsonl:1: "Be brief."')
    add_notes(notes, make_chunk(results).notes)
    assert notes["the chat template leaves out a tool call of an earlier answer"] == (2, 'data.jsonl:1: "add"')


def test_the_reasoning_of_earlier_turns_is_no_loss():
    tokenizer = made(CONDITIONAL)
    turns = user("hi"), assistant("<think>a greeting</think>\n\nhello"), user("2 + 2?")
    result = encoded(tokenizer, *turns, assistant("<think>two and two</think>\n\n4"))
    assert not result.notes
    assert texts(result, tokenizer) == (
        "<|user|>hi</s><|assistant|>hello</s><|user|>2 + 2?</s><|assistant|>",
        "<think>two and two</think>\n\n4</s>",
    )
    turns[1]["reasoning_content"] = "a greeting"
    assert not encoded(tokenizer, *turns, assistant("4")).notes


# where the response begins


def test_a_header_that_opens_a_block_is_part_of_the_prompt():
    """The prompt is what inference sends, the response what follows."""
    tokenizer = made(CHAT_TEMPLATE.replace(HEADER, OPENING))
    result = encoded(tokenizer, user("2 + 2?"), assistant("<think>\nTwo and two.\n</think>\n\n4"))
    assert not result.notes
    assert texts(result, tokenizer) == (
        "<|user|>2 + 2?</s>\n<|assistant|><think>\n",
        "Two and two.\n</think>\n\n4</s>",
    )


def test_an_answer_that_does_not_go_on_from_the_header():
    """Divided behind the longest common beginning of both token sequences, as they are at inference and here."""
    tokenizer = made(CHAT_TEMPLATE.replace(HEADER, OPENING))
    result = encoded(tokenizer, user("2 + 2?"), assistant("<table> 4"))
    expected, whole = (
        tokenizer("<|user|>2 + 2?</s>\n<|assistant|>" + rest, add_special_tokens=False)["input_ids"]
        for rest in ("<t", "<table> 4</s>")
    )  # both begin with the tokens of "<" and of "t"
    assert (result.prompt, result.response) == (expected, whole[len(expected) :])
    ((kind, example),) = [(note.kind, note.example) for note in result.notes]
    assert "otherwise than the prompt of inference" in kind
    assert r"</s>\n<|assistant|><think>\n" in example and "<table> 4" in example


@pytest.mark.parametrize("header", [HEADER, OPENING])
def test_the_reasoning_of_the_last_answer_is_kept_where_a_template_takes_it_out_of_all(header):
    """R1's: the prompt is what inference sends, the response what the model writes behind it."""
    tokenizer = made(NO_THOUGHTS.replace(HEADER, header))
    begun = "<think>\n" if header == OPENING else ""
    turns = user("hi"), assistant("<think>\na greeting\n</think>\n\nhello"), user("2 + 2?")
    prompt = f"<|user|>hi</s>\n<|assistant|>\n\nhello</s>\n<|user|>2 + 2?</s>\n<|assistant|>{begun}"
    thoughtful = "<think>\nTwo and two.\n</think>\n\n4"
    result = encoded(tokenizer, *turns, assistant(thoughtful))
    assert texts(result, tokenizer) == (prompt, thoughtful.removeprefix(begun) + "</s>")
    (note,) = result.notes
    assert "that of the rated one is kept" in note.kind and "Two and two." in note.example
    assert prompt == tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    ("content", "response"),
    [
        ("<think>\nTwo.\n</think>\n4", "Two.\n</think>\n4</s>"),
        ("<think>Two.</think>4", "Two.</think>4</s>"),
        ("\n<think>\n\nTwo.</think>4", "Two.</think>4</s>"),
        ("Two.\n</think>\n4", "Two.\n</think>\n4</s>"),  # as the model has written it
        ("<think>\nTwo, and never", "Two, and never</s>"),  # cut off
    ],
)
def test_reasoning_goes_on_in_the_block_that_the_header_opens(content, response):
    tokenizer = made(NO_THOUGHTS.replace(HEADER, OPENING))
    prompt, answer = texts(encoded(tokenizer, user("2 + 2?"), assistant(content)), tokenizer)
    assert (prompt, answer) == ("<|user|>2 + 2?</s>\n<|assistant|><think>\n", response)


def test_a_template_that_opens_a_block_and_takes_reasoning_out():
    """Without reasoning the header is divided."""
    tokenizer = made(NO_THOUGHTS.replace(HEADER, OPENING))
    result = encoded(tokenizer, user("2 + 2?"), assistant("5"))
    assert texts(result, tokenizer) == ("<|user|>2 + 2?</s>\n<|assistant|>", "5</s>")


def test_generation_gets_the_whole_header():
    tokenizer = made(NO_THOUGHTS.replace(HEADER, OPENING))
    (prompt,) = prompt_tokens([[user("2 + 2?")]], tokenizer, TokenizationSettings(append_eod=False))
    assert tokenizer.decode(prompt.tokens) == "<|user|>2 + 2?</s>\n<|assistant|><think>\n"


# where it ends


@pytest.mark.parametrize("behind", ["", "\n", "\n</s>", "</s>\n", " \n </s>"])
def test_nothing_behind_the_templates_own_end_is_trained_on(behind):
    tokenizer = made(CHAT_TEMPLATE.replace("</s>\n", "<|im_end|>" + behind), more=["<|im_end|>"])
    for append_eod in (True, False):
        result = encoded(tokenizer, user("say"), assistant("yes"), append_eod=append_eod)
        assert tokenizer.decode(result.response) == "yes<|im_end|>"
        differs, *more = reversed(kinds(result))
        assert differs.startswith("answers end with <|im_end|>") and "EOS token </s>" in differs
        assert len(more) == ("</s>" in behind)  # a line break goes without saying
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer) == {end, tokenizer.eos_token_id}


def test_a_template_whose_end_is_the_eos_token_says_nothing():
    assert not encoded(made(CHAT_TEMPLATE), user("say"), assistant("yes")).notes


def test_a_tool_call_that_ends_otherwise():
    """As Llama 3.1's does with a built-in tool; special tokens in front of the end do not count."""
    ending = OBJECTS.replace(
        "</s>",
        "{% if m.tool_calls %}<|end_of_call|>{% endif %}{{ '<|eom|>' if (m.tool_calls or [])[1:] else '</s>' }}\n",
    )
    tokenizer = made(ending, more=["<|end_of_call|>", "<|eom|>"])
    one = call()
    two = {**one, "tool_calls": one["tool_calls"] * 2}
    answers = [texts(encoded(tokenizer, user("say"), answer), tokenizer)[1] for answer in (one, two)]
    assert [answer.rpartition("]")[2] for answer in answers] == ["<|end_of_call|></s>", "<|end_of_call|><|eom|>"]


def test_a_template_without_an_end_gets_the_eos_token():
    tokenizer = made("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + HEADER)
    assert texts(encoded(tokenizer, user("say"), assistant("yes")), tokenizer)[1] == "yes</s>"
    assert texts(encoded(tokenizer, user("say"), assistant("yes"), append_eod=False), tokenizer)[1] == "yes"


# what a template gets


ARGUMENTS = '{"a":1,"b":"two"}'


@pytest.mark.parametrize(
    ("template", "given", "written", "noted"),
    [
        (OBJECTS, json.loads(ARGUMENTS), '{"a": 1, "b": "two"}', False),
        (OBJECTS, ARGUMENTS, '{"a": 1, "b": "two"}', True),
        (STRINGS, ARGUMENTS, ARGUMENTS, False),
        (STRINGS, json.loads(ARGUMENTS), '{"a": 1, "b": "two"}', True),
        (EITHER, ARGUMENTS, ARGUMENTS, False),
        (EITHER, json.loads(ARGUMENTS), '{"a": 1, "b": "two"}', False),
        (ITEMS, ARGUMENTS, "<k>a</k>1<k>b</k>two", True),
    ],
)  # fmt: skip
def test_arguments_as_the_record_has_them_or_in_the_form_the_template_takes(template, given, written, noted):
    tokenizer = made(template)
    result = encoded(tokenizer, user("1 + 2?"), call(arguments=given))
    assert texts(result, tokenizer)[1] == f"[add {written}]</s>"
    assert [kind for kind in kinds(result) if "arguments in another form" in kind] == kinds(result)
    assert len(kinds(result)) == noted


def test_a_template_that_insists_on_content_gets_an_empty_text():
    tokenizer = made(OBJECTS.replace("{{ m.content }}", "{{ '' + m.content }}"))
    result = encoded(tokenizer, user("1 + 2?"), call())
    assert texts(result, tokenizer)[1] == '[add {"a": 1, "b": "two"}]</s>'
    assert kinds(result) == ["the chat template refuses messages without content: theirs is empty text"]


def test_what_no_form_helps_is_refused_for_the_first_reason():
    refusing = made(
        "{% for m in messages if m.tool_calls %}"
        "{{ raise_exception('no ' ~ m.tool_calls[0].function.arguments) }}{% endfor %}"
    )
    assert (
        encoded(refusing, user("1 + 2?"), call(arguments="{}")).reason
        == "the chat template refuses the messages (no {})."
    )


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
"""As Gemma's first template does."""


def test_a_system_prompt_that_is_refused():
    tokenizer = made(NO_SYSTEM)
    conversation = system("Be brief."), user("say"), assistant("yes")
    bad = encoded(tokenizer, *conversation)
    assert re.search(r"refuses the messages \(no system\). It takes them without the system message", bad.reason)
    assert "model.data.system=merge_into_user" in bad.reason and "model.data.system=drop" in bad.reason
    merged = encoded(tokenizer, *conversation, system="merge_into_user")
    assert texts(merged, tokenizer)[0] == "<|user|>Be brief.\n\nsay</s>\n<|assistant|>" and not merged.notes
    dropped = encoded(tokenizer, *conversation, system="drop")
    assert texts(dropped, tokenizer)[0] == "<|user|>say</s>\n<|assistant|>"


def test_instructions_anywhere_are_merged_into_what_the_user_says_next():
    tokenizer = made(CHAT_TEMPLATE)
    turns = system("a"), system("b", "developer"), user("c"), assistant("d"), system("e"), user("f"), assistant("g")
    text, _ = texts(encoded(tokenizer, *turns, system="merge_into_user"), tokenizer)
    assert text == "<|user|>a\n\nb\n\nc</s>\n<|assistant|>d</s>\n<|user|>e\n\nf</s>\n<|assistant|>"
    late = encoded(tokenizer, user("a"), system("b"), assistant("c"), system="merge_into_user")
    assert "no user's message follows" in late.reason
    assert "no prompt is left" in encoded(tokenizer, system("b"), assistant("c"), system="drop").reason


def test_a_refusal_for_another_reason_offers_nothing():
    refusing = made("{{ raise_exception('never') }}")
    assert "model.data" not in encoded(refusing, system("a"), user("b"), assistant("c")).reason


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("%d %b %Y", "26 Jul 2024"),  # Llama 3's
        ("%Y-%m-%d", "2024-07-26"),  # gpt-oss's and Mistral's
        ("%A, %-d %B %Y %H:%M:%S", "Friday, 26 July 2024 00:00:00"),
        ("%y/%j %% %%d %d%%", "24/208 % %d 26%"),
        ("no date", "no date"),
    ],
)
def test_a_date_is_always_the_same_and_in_the_format_asked_for(format, expected):
    """Otherwise a run that is resumed on another day would train on other prompts."""
    tokenizer = made("{% set day = strftime_now('" + format + "') %}{{ day }}" + CHAT_TEMPLATE)
    prompt, _ = texts(encoded(tokenizer, user("say"), assistant("yes")), tokenizer)
    assert prompt == expected + "<|user|>say</s>\n<|assistant|>"


# found by a trial of a hundred models' templates


def test_another_turn_that_a_template_begins_behind_the_end_is_not_trained_on():
    """As ToolACE's does, whose EOS token is another; and as some do whose EOS token it is."""
    begins = "{% for m in messages %}<|h|>{{ m.role }}<|/h|>{{ m.content }}<|eot|>{% endfor %}<|h|>assistant<|/h|>"
    for eos in ("</s>", "<|eot|>"):
        tokenizer = made(begins, more=["<|eot|>", "<|h|>", "<|/h|>"], eos=eos)
        tokenizer.chat_template = begins
        result = encoded(tokenizer, user("say"), assistant("yes"))
        assert texts(result, tokenizer) == ("<|h|>user<|/h|>say<|eot|><|h|>assistant<|/h|>", "yes<|eot|>")
        assert any(kind.startswith("what the chat template writes behind <|eot|> is not") for kind in kinds(result))


def test_an_end_inside_of_an_answer_is_not_its_end():
    """A template that ends reasoning, too, with the token that ends answers."""
    twice = CHAT_TEMPLATE.replace("{{ m['content'] }}</s>", "{{ m.reasoning }}<|end|>{{ m['content'] }}<|end|>")
    tokenizer = made(twice, more=["<|end|>"])
    answer = assistant("yes", reasoning="why")
    assert texts(encoded(tokenizer, user("say"), answer), tokenizer)[1] == "why<|end|>yes<|end|>"


def test_special_tokens_in_an_answer_are_noted():
    result = encoded(made(CHAT_TEMPLATE), user("say"), assistant("a </s> b"))
    ((kind, example),) = [(note.kind, note.example) for note in result.notes]
    assert kind.startswith("special tokens that an assistant's message spells are taken as text")
    assert "model.data.special_tokens=control" in kind and example == 'data.jsonl:1: "</s>"'


def test_reasoning_tags_that_are_special_tokens_stay_tags():
    """Templates divide answers at them."""
    tokenizer = made(CONDITIONAL, more=["<think>", "</think>"])
    turns = user("hi"), assistant("<think>a greeting</think>hello"), user("2 + 2?"), assistant("<think>2</think>4")
    result = encoded(tokenizer, *turns)
    assert not result.notes and "greeting" not in tokenizer.decode(result.prompt)
    assert tokenizer.convert_tokens_to_ids("<think>") in result.response


def test_special_tokens_that_only_the_json_of_arguments_spells_are_text():
    tokenizer = made(OBJECTS)
    spelled = '{"a": "\\u003c/s\\u003e"}'  # </s>
    result = encoded(tokenizer, user("say"), call(arguments=spelled))
    assert result.response.count(tokenizer.eos_token_id) == 1
    assert texts(result, tokenizer)[1] == '[add {"a": "</s>"}]</s>'


@pytest.mark.parametrize("how", ["tojson(ensure_ascii=True)", "string"])
def test_special_tokens_come_back_however_an_object_is_written(how):
    tokenizer = made(CALLS.replace("ARGUMENTS", "{{ call.function.arguments | %s }}" % how))  # noqa: UP031
    result = encoded(tokenizer, user("say"), call(arguments={"a": "b </s> c"}))
    assert "b </s> c" in texts(result, tokenizer)[1] and "\ue000" not in tokenizer.decode(result.response)


def test_a_closing_tag_is_no_end():
    """A template that ends nothing but calls with a special token: the EOS token follows."""
    tokenizer = made(CALLS.replace("</s>", "").replace("ARGUMENTS]", "]<|calls_end|>"), more=["<|calls_end|>"])
    result = encoded(tokenizer, user("say"), call(arguments={}))
    assert texts(result, tokenizer)[1] == "[add ]<|calls_end|></s>"
    assert any(
        "ends an answer with no token of its own; the EOS token </s> is put there" in kind for kind in kinds(result)
    )


@pytest.mark.parametrize("header", ["<think>\n", "Here is what I think:\n"])
def test_an_answer_that_was_cut_off_in_what_its_header_opens(header):
    tokenizer = made(
        CHAT_TEMPLATE.replace(HEADER, "{% if add_generation_prompt %}<|assistant|>" + header + "{% endif %}")
    )
    result = encoded(tokenizer, user("2 + 2?"), assistant(header + "Let me see, and never"))
    assert not result.notes and texts(result, tokenizer)[1] == "Let me see, and never</s>"


def test_an_empty_block_that_inference_puts_in_front_stays_in_the_prompt():
    """As Gemma 4's and QwQ's headers do; the conversation is written without it."""
    block = "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}"
    tokenizer = made(CHAT_TEMPLATE.replace(HEADER, block), more=["<think>", "</think>"])
    result = encoded(tokenizer, user("2 + 2?"), assistant("4"))
    assert texts(result, tokenizer) == ("<|user|>2 + 2?</s>\n<|assistant|><think>\n\n</think>\n\n", "4</s>")
    assert len(kinds(result)) == 1 and "an empty block in front of the answer" in kinds(result)[0]


AGENTIC = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning and (loop.last or messages[-1].role != 'assistant') %}({{ m.reasoning }}){% endif %}"
    "{{ m.content }}</s>{% else %}<|user|>{{ m.content }}</s>{% endif %}{% endfor %}" + HEADER
)
"""As gpt-oss does: the reasoning of earlier steps is written until there is a final answer."""


def test_earlier_turns_that_are_written_otherwise_once_they_are_answered():
    tokenizer = made(AGENTIC)
    turns = user("q"), assistant("step", reasoning="why"), user("result")
    prompt = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    assert "(why)" in prompt
    result = encoded(tokenizer, *turns, assistant("done"))
    assert texts(result, tokenizer) == (prompt, "done</s>")
    assert len(kinds(result)) == 1 and "earlier turns otherwise once they are answered" in kinds(result)[0]


def test_content_and_arguments_in_the_only_form_a_template_takes():
    tokenizer = made(STRINGS.replace("{{ m.content }}", "{{ '' + m.content }}"))
    result = encoded(tokenizer, user("1 + 2?"), call())
    assert texts(result, tokenizer)[1] == '[add {"a": 1, "b": "two"}]</s>'


@pytest.mark.parametrize("given", ['{"a": 1}', "{}"])
def test_strings_that_a_template_skips_or_quotes_become_objects(given):
    items = "{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}"
    skipping = made(
        CALLS.replace(
            "ARGUMENTS", "{% set a = call.function.arguments %}{% if a is mapping %}" + items + "{% endif %}"
        )
    )
    assert texts(encoded(skipping, user("?"), call(arguments=given)), skipping)[1] in (
        "[add a=1]</s>",
        "[add ]</s>",
    )
    quoting = made(OBJECTS)
    repeated = user(f"call it with {given}")  # the same text elsewhere
    assert texts(encoded(quoting, repeated, call(arguments=given)), quoting)[1] == f"[add {given}]</s>"


def test_the_part_that_is_missing_is_the_one_that_is_named():
    """Of two equal texts the one that templates leave out more often; of a tool what only its schema says."""
    deaf = made(CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'developer'"))
    result = encoded(deaf, system("hello", "developer"), user("hello"), assistant("yes"))
    assert kinds(result) == ["the chat template leaves out the developer message"]
    bad = encoded(made(CHAT_TEMPLATE), user("?"), assistant("Yes.", reasoning_content="Yes."))
    assert "leaves its reasoning out" in bad.reason
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds numbers."}}]
    result = encoded(made(OBJECTS), user("?"), call(), user("?"), assistant("3"), tools=tools)
    assert kinds(result) == ["the chat template leaves out the tools' schemas"]


def test_switches_and_tags_in_texts():
    obeying = made(CHAT_TEMPLATE.replace("m['content']", "m['content'].replace('/no_think', '')"))
    assert not encoded(obeying, user("say /no_think"), assistant("yes")).notes
    assert not encoded(made(CHAT_TEMPLATE), user("What do /think and </think> mean?"), assistant("yes")).notes
    assert not encoded(made(CHAT_TEMPLATE), user("?"), assistant("pre <think>r</think> post")).notes


def test_templates_by_name():
    tokenizer = made(None)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ mood }}{{ tools | tojson }}" + CHAT_TEMPLATE}
    tools = [{"type": "function", "function": {"name": "add"}}]
    result = encoded(tokenizer, user("say"), assistant("yes"), tools=tools, template_kwargs={"mood": "curt"})
    assert not result.notes and texts(result, tokenizer)[0].startswith("curt[")


def test_advice_is_given_only_where_it_helps():
    """The template takes the messages without the system message, but still renders no beginning."""
    numbering = made(NO_SYSTEM.replace("{% if add", "{{ messages | length }}{% if add").replace("<|assistant|>", ""))
    bad = encoded(numbering, system("a"), user("b"), assistant("c"))
    assert "no system" in bad.reason and "model.data" not in bad.reason


def test_looking_for_parts_takes_no_longer_than_their_number(monkeypatch):
    """A thousand equal small parts, and one that is missing: each looks at the text a few times."""
    from nemo_kto.data.tokens import lost_parts

    finds = []
    take = lost_parts._Room._take_form
    monkeypatch.setattr(lost_parts._Room, "_take_form", lambda room, form: finds.append(1) or take(room, form))
    turns = [message for _ in range(500) for message in (user("1"), assistant("2"))]
    result = encoded(
        made(CHAT_TEMPLATE), *turns, user("?"), assistant("3", reasoning="because"), template_losses="warn"
    )
    assert kinds(result) == ["the chat template leaves out its reasoning"] and len(finds) < 20


def test_generation_gets_arguments_as_training_does():
    tokenizer = made(OBJECTS)
    turns = [user("1 + 2?"), call(arguments='{"a": 1}'), {"role": "tool", "content": "3"}]
    (prompt,) = prompt_tokens([turns], tokenizer, TokenizationSettings(append_eod=False))
    assert prompt.tokens.tolist() == encoded(tokenizer, *turns, assistant("3")).prompt


# the shapes of published templates


def one_line(template):
    """A template without the line breaks and the indentation that it is written with here."""
    return "".join(line.strip() for line in template.splitlines())


DEEPSEEK = one_line(r"""
    {{ bos_token }}
    {% for m in messages %}
        {% if m.role == 'user' %}<|user|>{{ m.content }}
        {% elif m.role == 'system' %}{{ m.content }}
        {% else %}<|assistant|></think>{{ m.content.split('</think>', 1)[-1] }}</s>
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}<|assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}
""")
"""As DeepSeek-V3.1 does: BOS by the template, reasoning taken out of all answers, whose block is open or closed."""


def test_bos_by_the_template_is_there_once_and_reasoning_goes_where_it_was_asked_for():
    tokenizer = train_byte_level(bos=True)
    tokenizer.chat_template = DEEPSEEK
    turns = system("Be brief."), user("2 + 2?")
    answer = assistant("<think>Two and two.</think>4")
    result = encoded(tokenizer, *turns, answer, template_kwargs={"thinking": True})
    prompt, response = texts(result, tokenizer)
    assert (prompt, response) == ("<s>Be brief.<|user|>2 + 2?<|assistant|><think>", "Two and two.</think>4</s>")
    assert result.prompt.count(tokenizer.bos_token_id) == 1 and result.prompt[0] == tokenizer.bos_token_id
    assert result.response.count(tokenizer.eos_token_id) == 1
    plain = encoded(tokenizer, *turns, assistant("4"))
    assert texts(plain, tokenizer) == ("<s>Be brief.<|user|>2 + 2?<|assistant|></think>", "4</s>")
    assert not plain.notes
    refused = encoded(tokenizer, *turns, answer)  # the prompt says that nothing is to be thought
    assert refused.reason.startswith('the chat template leaves its reasoning out of the answer, "Two and two."')
    assert "chat_template_kwargs may open it" in refused.reason
    in_field = encoded(
        tokenizer, *turns, assistant("4", reasoning_content="Two and two."), template_kwargs={"thinking": True}
    )
    assert "Put it into 'content' between <think> and </think>" in in_field.reason


HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
HARMONY = one_line(r"""
    {% set last = messages | length - 1 %}
    <|start|>system<|message|>Today is {{ strftime_now('%Y-%m-%d') }}<|end|>
    {% for m in messages %}
        {% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
        {% elif 'tool_calls' in m %}
            {% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
            {% set f = m.tool_calls[0].function %}
            <|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>
            {{ f.arguments | tojson }}<|call|>
        {% elif loop.index0 == last and not add_generation_prompt %}
            {% if 'thinking' in m %}
                <|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
            {% endif %}
            <|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
        {% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}<|start|>assistant{% endif %}
""")
"""As gpt-oss does: channels, another end of the last answer, another header than in the prompt of inference."""
TODAY = "<|start|>system<|message|>Today is 2024-07-26<|end|>"


@pytest.mark.parametrize("field", ["thinking", "reasoning_content", "reasoning"])
def test_channels(field):
    tokenizer = made(HARMONY, eos="<|return|>", more=HARMONY_TOKENS)
    turns = user("hi"), assistant("hello", **{field: "a greeting"}), user("2 + 2?")
    result = encoded(tokenizer, *turns, assistant("4", **{field: "Two and two."}))
    assert texts(result, tokenizer) == (
        TODAY + "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>hello<|end|>"
        "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
    )
    noted = ["the chat template reads reasoning in the field 'thinking' of a message: it gets it there"]
    assert kinds(result) == ([] if field == "thinking" else noted)
    assert field == "thinking" or result.notes[0].example == 'data.jsonl:1: "a greeting"'
    short = encoded(tokenizer, user("2 + 2?"), assistant("4"))
    assert texts(short, tokenizer)[1] == "<|channel|>final<|message|>4<|return|>" and not short.notes


def test_reasoning_in_a_field_that_a_template_reads_stays_there():
    """It may read several; and what another field says is not dropped without a word."""
    both = made(CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m.reasoning or m.thinking }}: {{ m['content'] }}"))
    for field in ("reasoning", "thinking"):
        result = encoded(both, user("?"), assistant("4", **{field: "Two."}))
        assert texts(result, both)[1] == "Two.: 4</s>" and not result.notes
    same = encoded(both, user("?"), assistant("4", thinking="Two.", reasoning_content="Two."))
    assert texts(same, both)[1] == "Two.: 4</s>" and not same.notes
    bad = encoded(both, user("?"), assistant("4", thinking="Two.", reasoning_content="And two."))
    assert bad.reason.startswith('the chat template leaves its reasoning out of the answer, "And two."')


def test_a_call_in_a_channel_ends_with_its_own_token():
    tokenizer = made(HARMONY, eos="<|return|>", more=HARMONY_TOKENS)
    result = encoded(tokenizer, user("1 + 2?"), call(thinking="I add."))
    assert texts(result, tokenizer)[1] == (
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
        '<|message|>{"a": 1, "b": "two"}<|call|>'
    )
    assert kinds(result)[0].startswith("answers end with <|call|>")


GLM = one_line(r"""
    {% set quick = enable_thinking is defined and not enable_thinking %}
    <sop>
    {% for m in messages %}
        {% if m.role == 'user' %}<|user|>{{ '\n' ~ m.content }}{{ '/nothink' if quick }}
        {% elif m.role == 'assistant' %}
            {% set r, c = m.reasoning_content or '', m.content %}
            {% if '</think>' in c %}
                {% set r, c = c.split('</think>')[0].split('<think>')[-1], c.split('</think>')[-1] %}
            {% endif %}
            <|assistant|>
            {{ '\n<think>' ~ r.strip() ~ '</think>' if loop.last and r else '\n<think></think>' }}
            {{ '\n' ~ c.strip() }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}<|assistant|>{{ '\n<think></think>' if quick }}{% endif %}
""")
"""As GLM-4.5 does: an empty block where nothing was thought, and no end of an answer but the next turn's header."""


def test_blocks_that_are_empty_and_answers_without_an_end():
    tokenizer = made(GLM, more=["<sop>", "<think>", "</think>"])
    turns = user("hi"), assistant("<think>a greeting</think>hello"), user("2 + 2?")
    prompt = "<sop><|user|>\nhi<|assistant|>\n<think></think>\nhello<|user|>\n2 + 2?<|assistant|>"
    for answer in (assistant("4", reasoning_content="Two."), assistant("<think>Two.</think>\n4")):
        result = encoded(tokenizer, *turns, answer)
        assert texts(result, tokenizer) == (prompt, "\n<think>Two.</think>\n4</s>")
        (note,) = kinds(result)
        assert "ends an answer with no token of its own; the EOS token </s> is put there" in note
    quick = encoded(tokenizer, user("2 + 2?"), assistant("4"), template_kwargs={"enable_thinking": False})
    assert texts(quick, tokenizer) == ("<sop><|user|>\n2 + 2?/nothink<|assistant|>\n<think></think>", "\n4</s>")


QWEN = one_line(r"""
    {% if messages[0].role != 'system' and messages | selectattr('role', 'equalto', 'system') | list %}
        {{ raise_exception('System message must be at the beginning.') }}
    {% endif %}
    {% for m in messages %}
        <|im_start|>{{ m.role ~ '\n' }}
        {% if m.role == 'assistant' %}
            {% set r, c = m.reasoning_content or '', m.content %}
            {% if '</think>' in c %}
                {% set r, c = c.split('</think>')[0].split('<think>')[-1], c.split('</think>')[-1] %}
            {% endif %}
            {{ '<think>\n' ~ r.strip() ~ '\n</think>\n\n' if loop.last }}{{ c.lstrip() }}
        {% else %}{{ m.content }}
        {% endif %}
        <|im_end|>{{ '\n' }}
    {% endfor %}
    {% if add_generation_prompt %}
        {% set quick = enable_thinking is defined and not enable_thinking %}
        <|im_start|>{{ 'assistant\n' }}{{ '<think>\n\n</think>\n\n' if quick else '<think>\n' }}
    {% endif %}
""")
"""As Qwen3.5 does: the header opens the block of reasoning, the conversation has one with every last answer."""


def test_a_header_that_thinks_unless_told_otherwise():
    tokenizer = made(QWEN, eos="<|im_end|>", more=["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    turns = user("hi"), assistant("hello", reasoning_content="a greeting"), user("2 + 2?")
    prompt = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    for answer in (assistant("4", reasoning="Two."), assistant("<think>\nTwo.\n</think>\n\n4")):
        result = encoded(tokenizer, *turns, answer)
        assert texts(result, tokenizer) == (prompt, "Two.\n</think>\n\n4<|im_end|>")
    (note,) = kinds(encoded(tokenizer, *turns, assistant("4", reasoning="Two.")))
    assert "'reasoning_content'" in note
    quick = encoded(tokenizer, *turns, assistant("4"), template_kwargs={"enable_thinking": False})
    assert texts(quick, tokenizer) == (prompt + "\n</think>\n\n", "4<|im_end|>") and not quick.notes
    # nothing was thought where the prompt asks to think: a block that is closed at once
    silent = encoded(tokenizer, *turns, assistant("4"))
    assert texts(silent, tokenizer) == (prompt, "\n</think>\n\n4<|im_end|>")


def test_a_system_message_in_the_middle_is_refused_with_what_to_set():
    tokenizer = made(QWEN, eos="<|im_end|>", more=["<|im_start|>", "<|im_end|>"])
    bad = encoded(tokenizer, user("hi"), assistant("hello"), system("Be brief."), user("2 + 2?"), assistant("4"))
    assert "System message must be at the beginning" in bad.reason
    assert "model.data.system=merge_into_user" in bad.reason


def test_generation_gets_reasoning_of_earlier_turns_as_training_does():
    tokenizer = made(HARMONY, eos="<|return|>", more=HARMONY_TOKENS)
    turns = [user("1 + 2?"), call(reasoning_content="I add."), {"role": "tool", "content": "3"}]
    (prompt,) = prompt_tokens([turns], tokenizer, TokenizationSettings(append_eod=False))
    assert prompt.tokens.tolist() == encoded(tokenizer, *turns, assistant("3")).prompt
    assert "I add." in tokenizer.decode(prompt.tokens)


def test_a_field_is_read_only_where_a_template_names_it_as_one():
    """DeepSeek-V3.1's `thinking` is a variable."""
    tokenizer = made(DEEPSEEK)
    kept = encoded(tokenizer, user("?"), assistant("4", reasoning_content="Two."), template_losses="warn")
    assert kinds(kept) == ["the chat template leaves out its reasoning"]


def test_a_template_that_cannot_be_chosen():
    tokenizer = made({"one": CHAT_TEMPLATE, "other": CHAT_TEMPLATE})
    assert encoded(tokenizer, user("?"), assistant("4")).reason.startswith("no chat template can be chosen (")

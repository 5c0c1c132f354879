"""The formats that people have feedback in: which columns hold prompt, response and label, and how they are read.

docs/data.md shows a sample of each. Field names and meanings are those of

    trl, pairs       TRL docs/source/dataset_formats.md and trl/data_utils.py (f2cd57710a)
    nemo_aligner     NeMo-Aligner nemo_aligner/data/nlp/datasets.py (af2b3bd96a)
    alpaca, sharegpt, messages
                     LLaMA-Factory src/llamafactory/data/converter.py (ff6d4d12ee); of `messages` also ms-swift
                     docs/source_en/Customization/Custom-dataset.md (3602360a56)
    halos            HALOs train/data.py (4831988636)
    openai_dpo       OpenAI's guide to direct preference optimization; Azure's, Fireworks' and Together's are the same.
                     `preferred_completion` is what OpenAI's specification 2.3.0 has
    helpsteer3       the card of nvidia/HelpSteer3, configuration "preference"
    langfuse, langsmith, chatui
                     see `exports.py`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nemo_kto.data.reading import answers, exports
from nemo_kto.data.reading.columns import Answer, Columns
from nemo_kto.data.reading.json_strings import MESSAGES, OBJECTS, Spelling


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write feedback.

    Attributes:
        read: Row -> the answers in it.
        required: Names that a row of this format has.
        names: See `Columns`.
        without: Names that a row of this format does not have; only detection asks for them.
        fits: What else is true of such a row; only detection asks.
        labels: Row -> the places that may hold its label, by what they are called in a message; None where the columns
            in `names` are all there are.
        spelling: See `Columns`; None where prompts and responses are text.
        rated: Whether a column of ratings may stand in for the labels.
    """

    read: Callable[[Columns], list[Answer]]
    required: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    fits: Callable[[Columns], bool] | None = None
    labels: Callable[[Columns], Mapping[str, str]] | None = None
    spelling: Spelling | None = MESSAGES
    rated: bool = True


_SINGLE = ("prompt", "response", "label")
_COMPARED = ("prompt", "output_A", "output_B", "label")
_CONVERSATION = {"messages": ("messages", "conversations"), "label": ("label", "kto_tag")}
FORMATS: Mapping[str, Format] = {
    "nemo_aligner": Format(answers.single, _SINGLE, {"label": ("preference", "label")}),
    "trl": Format(answers.single, _SINGLE, {"response": ("completion",)}),
    "halos": Format(answers.single, _SINGLE, {"response": ("output",)}),
    "halos_pairs": Format(answers.compared_pair, _COMPARED, rated=False),
    "alpaca": Format(
        answers.alpaca,
        ("instruction", "response", "label"),
        {"response": ("output",), "label": ("kto_tag", "label")},
        spelling=None,
    ),
    "alpaca_pairs": Format(answers.alpaca, ("instruction", "chosen", "rejected"), spelling=None),
    "messages": Format(answers.messages, ("messages", "label"), _CONVERSATION),
    "sharegpt": Format(answers.messages, ("messages", "label"), {**_CONVERSATION, "messages": ("conversations",)}),
    # ultrafeedback_binarized has a prompt, pairs, and the chosen conversation once more as messages
    "message_pairs": Format(answers.messages, ("messages", "chosen", "rejected"), _CONVERSATION, without=("prompt",)),
    "nemo_aligner_pairs": Format(
        answers.prompted_pair,
        ("prompt", "chosen", "rejected"),
        {"chosen": ("chosen_response",), "rejected": ("rejected_response",)},
    ),
    "pairs": Format(answers.pair, ("chosen", "rejected")),
    "helpsteer3": Format(
        answers.signed_pair,
        _COMPARED,
        {
            "prompt": ("context", "prompt"),
            "output_A": ("response1", "output_A"),
            "output_B": ("response2", "output_B"),
            "label": ("overall_preference", "label"),
        },
        rated=False,
    ),
    "openai_dpo": Format(
        answers.exported_pair,
        ("prompt", "chosen", "rejected"),
        {
            "prompt": ("input.messages", "input"),
            "chosen": ("preferred_output", "preferred_completion"),
            "rejected": ("non_preferred_output", "non_preferred_completion"),
            "tools": ("tools", "input.tools"),
        },
        spelling=OBJECTS,
    ),
    "langfuse": Format(
        exports.trace,
        _SINGLE,
        {
            "prompt": ("input.messages", "input"),
            "response": ("output",),
            "label": ("scores",),
            "tools": ("tools", "input.tools"),
        },
        labels=exports.langfuse_labels,
        spelling=OBJECTS,
    ),
    "langsmith": Format(
        exports.trace,
        _SINGLE,
        {
            "prompt": ("inputs.messages", "inputs"),
            "response": ("outputs",),
            "label": ("feedback_stats",),
            "tools": ("tools", "inputs.tools", "extra.invocation_params.tools"),
        },
        labels=exports.langsmith_labels,
        spelling=OBJECTS,
    ),
    "chatui": Format(
        exports.rated_messages,
        ("messages",),
        without=("label", "chosen", "rejected"),
        fits=exports.has_scores,
        rated=False,
    ),
}
"""Name -> format, in the order in which a row is compared with them."""

_OTHERS = ("system", "tools", "chat_template_kwargs", "input", "history", "weight", "images")
FIELDS = tuple(dict.fromkeys([*(name for found in FORMATS.values() for name in found.required), *_OTHERS]))
"""Names that `fields` may give columns to."""

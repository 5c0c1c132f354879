"""Every spelling of thumbs up and thumbs down, what is refused, and ratings with a threshold."""

import math
from decimal import Decimal

import pytest

from nemo_kto.data.reading.labels import Judge, parse_label, parse_threshold, parse_weight, parse_words
from nemo_kto.data.reading.records import RecordError
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.errors import ConfigError

UP = [
    *(True, 1, 1.0, "true", "True", "TRUE", " true\n", "1", "chosen", "Chosen", "CHOSEN", "desirable"),
    *(
        "up",
        "thumbs up",
        "thumbs_up",
        "thumbs-up",
        "Thumbs Up",
        "THUMBS_UP",
        "thumb up",
        "👍",
        "👍🏻",
        "👍🏿",
        "👍\ufe0f",
    ),
]
DOWN = [
    *(False, 0, 0.0, -0.0, "false", "False", "FALSE", "\tfalse ", "0", "rejected", "Rejected", "undesirable"),
    *("down", "thumbs down", "thumbs_down", "thumbs-down", "Thumbs  Down", "thumb down", "👎", "👎🏽", "👎\ufe0f"),
]
# each of them could be taken for one of the two by somebody
NEITHER = [
    *(None, "", " ", "yes", "no", "good", "bad", "y", "n", "t", "f", "on", "off", "ok", "null", "none", "nan"),
    *("1.5", "0.1", "01", "+1", "-1", "2", "True.", "truefalse", "not true", "choose", "reject", "positive"),
    *("thumbs", "thumb", "thumbsup", "👍👎", "👍 👍", "👌", "\U0001f3fb", "\ud800", "１"),
    *(2, -1, 5, 0.5, 1.0000001, 1e-9, 10**400, math.nan, math.inf, -math.inf),
    *([], [True], {}, {"label": True}, b"true", (1,), Decimal(1)),
]


@pytest.mark.parametrize("value", UP)
def test_thumbs_up(value):
    assert parse_label(value, "label") is True


@pytest.mark.parametrize("value", DOWN)
def test_thumbs_down(value):
    assert parse_label(value, "label") is False


@pytest.mark.parametrize("value", NEITHER, ids=ascii)
def test_refused_labels(value):
    with pytest.raises(RecordError, match="field 'vote' must be true or false, 1 or 0.*, got ") as caught:
        parse_label(value, "vote")
    str(caught.value).encode()  # it can be printed, whatever was in the label


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("maybe", 'got "maybe".'),
        (None, "got null."),
        (["👌"], 'got ["👌"].'),
        ("\ud800", "ud800"),
        (b"1", "got bytes."),
    ],
)
def test_refused_label_is_shown(value, expected):
    with pytest.raises(RecordError) as caught:
        parse_label(value, "label")
    assert expected in str(caught.value)


def test_long_label_is_cut_short():
    with pytest.raises(RecordError) as caught:
        parse_label("x" * 10_000, "label")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "hinted"), [(4, True), (0.7, True), ("4", True), (" 0.5 ", True), ("good", False), (None, False)]
)
def test_ratings_are_told_of_the_threshold(value, hinted):
    with pytest.raises(RecordError) as caught:
        parse_label(value, "label")
    assert ("desirable_if" in str(caught.value)) is hinted


@pytest.mark.parametrize(
    ("text", "below", "equal", "above"),
    [
        (">= 4", False, True, True),
        (">=4.0", False, True, True),
        ("> 4", False, False, True),
        ("  <= 4e0 ", True, True, False),
        ("< +4", True, False, False),
        ("== 4.", False, True, False),
        ("!= .4e1", True, False, True),
    ],
)
def test_threshold(text, below, equal, above):
    threshold = parse_threshold(text)
    assert [threshold.holds(value, "score") for value in (3, 4, 5)] == [below, equal, above]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-0.5, True), (-0.51, False), ("-0.5", True), (" 1e3 ", True), (math.inf, True), (Decimal("-1"), False)],
)
def test_ratings(value, expected):
    assert parse_threshold(">= -0.5").holds(value, "score") is expected


@pytest.mark.parametrize(
    "value", [None, True, False, "", "good", "4 stars", "nan", math.nan, [], [4], {}, 10**400, "\ud800"], ids=ascii
)
def test_rating_that_is_no_number(value):
    with pytest.raises(
        RecordError, match="field 'stars' must be a number, to be compared with '>= 4', got "
    ) as caught:
        parse_threshold(">= 4").holds(value, "stars")
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        ">=",
        ">= x",
        "=> 4",
        "= 4",
        ">= 4 5",
        "4 <",
        ">= 4 and < 5",
        ">= nan",
        ">= inf",
        ">> 4",
        ">= 1e",
        ">= .",
    ],
)
def test_refused_thresholds(text):
    with pytest.raises(ConfigError, match="desirable_if=.*comparison with a number"):
        parse_threshold(text)


WORDS = parse_words({"desirable": ["Good", "like", "+1", "thumbs-Up!", "👌", 5], "undesirable": ["bad", -1, "0.50"]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(
            (value, True)
            for value in ("good", " GOOD\n", "like", "+1", 1, "1", True, "true", "thumbs up!", "👌🏽", 5, "5.0")
        ),
        *(
            (value, False)
            for value in ("bad", "BAD", -1, "-1", -1.0, 0.5, ".5", "5e-1", 0, False, "false", "rejected")
        ),
    ],
)
def test_words_of_the_user_and_those_that_are_known(value, expected):
    assert Judge(WORDS).desirable(value, "vote") is expected


@pytest.mark.parametrize(
    ("labels", "value", "expected"),
    [
        ({"undesirable": [1], "desirable": [0]}, True, False),  # a flag of what is wrong with an answer
        ({"undesirable": [1], "desirable": [0]}, "1.0", False),
        ({"undesirable": [1], "desirable": [0]}, "False", True),
        ({"undesirable": [True]}, 1, False),
        ({"undesirable": "chosen"}, "Chosen", False),
        ({"desirable": []}, "up", True),
    ],
)
def test_words_of_the_user_go_first(labels, value, expected):
    assert Judge(parse_words(labels)).desirable(value, "vote") is expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"good": ["x"]}, "must be the words of both kinds"),
        (["good"], "must be the words of both kinds"),
        ("good", "must be the words of both kinds"),
        ({"desirable": [None]}, "desirable holds a null; it must hold words or numbers"),
        ({"desirable": {"a": 1}}, "desirable holds a object; it must hold words or numbers"),
        ({"desirable": ["good"], "undesirable": [" Good"]}, "' Good' is in both lists"),
        ({"desirable": [1], "undesirable": ["true"]}, "'true' is in both lists"),
        ({"desirable": ["thumbs_up"], "undesirable": ["Thumbs up"]}, "'Thumbs up' is in both lists"),
    ],
)
def test_impossible_words(labels, expected):
    with pytest.raises(ConfigError, match=f"model.data.labels.*{expected}"):
        parse_words(labels)


def test_words_and_ratings_exclude_each_other():
    with pytest.raises(ConfigError, match=r"model\.data\.labels says .* model\.data\.desirable_if .* one of the two"):
        RowReader(desirable_if=">= 4", labels=WORDS).check()


def test_unknown_labels_are_told_of_words():
    for value, word in (("ok, fine", '"ok, fine"'), (-1, "-1"), ("-1", '"-1"')):
        with pytest.raises(RecordError) as caught:
            parse_label(value, "label")
        assert f"model.data.labels={{desirable: [{word}]}} or model.data.labels={{undesirable: [{word}]}}." in str(
            caught.value
        )
    with pytest.raises(RecordError) as caught:
        Judge(WORDS).desirable(4, "label")
    assert "model.data.labels" in str(caught.value) and "desirable_if" not in str(caught.value)  # not both at once


@pytest.mark.parametrize(
    ("value", "expected"), [(None, 1), ("", 1), (" ", 1), ("0.5", 0.5), (" 2 ", 2), ("1e1", 10), (0, 0)]
)
def test_weights(value, expected):
    assert parse_weight(value, "weight") == expected


@pytest.mark.parametrize("value", ["1_0", "٣", "inf", "nan", "-1", "0x1", True, [1], -0.1, math.inf, b"1"], ids=ascii)
def test_refused_weights(value):
    with pytest.raises(RecordError, match="field 'weight' must be a number of at least 0"):
        parse_weight(value, "weight")

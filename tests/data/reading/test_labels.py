"""Every spelling of thumbs up and thumbs down, what is refused, and ratings with a threshold."""

import math
from decimal import Decimal

import pytest

from nemo_kto.data.reading.labels import parse_label, parse_threshold
from nemo_kto.data.reading.records import RecordError
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

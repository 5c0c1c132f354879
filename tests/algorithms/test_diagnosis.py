"""Warnings about a run's health: series made by hand for each kind, near misses, and series of healthy runs.

The rewards and the KL estimate of a series are chosen; losses follow from them by equation 7 of arXiv 2402.01306.
"""

import ast
import math
import re
from pathlib import Path

import pytest

from nemo_kto.algorithms.diagnosis import WARNINGS, Diagnosis, GradientSpikes
from nemo_kto.config.reader import leaf_values
from nemo_kto.config.schema import KTOConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PATIENCE = 10  # a zero gradient and huge margins are then reported after 2 steps
KINDS = {text.split(":")[0]: kind for kind, text in WARNINGS.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def step(chosen=0.0, rejected=0.0, *, kl=0.0, lr=1e-6, grad_norm=1.0, beta=0.1, **changes):
    """Metrics of one step of 50 % thumbs up; None takes a metric out, as does None for a class's reward."""
    losses = {}
    if chosen is not None:
        losses["loss/chosen"] = 1 - sigmoid(chosen - beta * kl)
    if rejected is not None:
        losses["loss/rejected"] = 1 - sigmoid(beta * kl - rejected)
    metrics = {
        "loss": sum(losses.values()) / len(losses),
        **losses,
        "kl": kl,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if None in (chosen, rejected) else chosen - rejected,
        "grad_norm": grad_norm,
        "lr": lr,
        **changes,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def warned(series, **settings):
    """Returns the kinds of warnings by the number of the step, from 1, that gave rise to them."""
    diagnosis = Diagnosis(patience=PATIENCE, **settings)
    found = {}
    for number, metrics in enumerate(series, start=1):
        for text in diagnosis.update(metrics):
            found.setdefault(number, []).append(KINDS[text.split(":")[0]])
    return found


def learning(steps, *, margin_per_step=0.02, warmup=0, lr=1e-6, kl_per_step=0.01):
    """A run in which the rewards of the classes come apart evenly once the warm-up is over; it begins at zero."""
    for number in range(steps):
        progress = max(0, number - warmup) * margin_per_step / 2
        rate = lr * min(1.0, (number + 1) / (warmup + 1))
        yield step(progress, -progress, kl=kl_per_step * max(0, number - warmup), lr=rate)


def moving(chosen=0.1, rejected=-0.1, **changes):
    """A step of a run that learns."""
    return step(chosen, rejected, kl=0.2, **changes)


def test_a_run_that_learns_is_healthy() -> None:
    assert warned(learning(500)) == {}


def test_slow_learning_and_a_long_warmup_are_healthy() -> None:
    # in the ten steps after the warm-up the margin is 0.022 on average, the rewards 0.011
    series = list(learning(400, margin_per_step=0.004, warmup=100))
    assert series[99]["loss"] == 0.5
    assert warned(series) == {}


def test_a_warmup_at_a_rate_of_zero_is_healthy() -> None:
    assert warned([step(lr=0.0)] * 300 + list(learning(100))) == {}


def test_kl_that_is_zero_while_the_rewards_come_apart_is_healthy() -> None:
    # the estimate is clamped at zero: the model makes other prompts' answers less likely
    assert warned(learning(100, kl_per_step=0.0)) == {}


def test_batches_of_one_sample_are_healthy() -> None:
    up, down = moving(rejected=None), moving(chosen=None)
    assert warned([up, down, down, up, up, up, down] * 50) == {}


def test_steps_that_the_loss_scaler_skipped_are_healthy() -> None:
    assert warned([step(grad_norm=None)] * 100 + list(learning(50))) == {}


def test_a_resumed_run_is_healthy() -> None:
    series = [moving(0.2 + 0.1 * (number % 2), -3.0) for number in range(100)]
    assert warned(series) == {}


def test_nothing_is_said_about_metrics_that_are_missing_or_no_numbers() -> None:
    strange = step(math.nan, math.nan, kl=math.nan, grad_norm=math.nan)
    assert warned([strange] * 100) == {}
    assert warned([{"rewards/chosen": 0.0, "rewards/rejected": 0.0}] * 100) == {}


def test_a_policy_that_stays_the_reference() -> None:
    # the first step does not count: every run begins so
    assert warned([step()] * 100) == {11: ["kl", "loss"]}
    assert warned([step()] * 100, has_kl=False) == {11: ["loss"]}


def test_the_warmup_does_not_count_as_being_stuck() -> None:
    series = [step(lr=1e-8 * number) for number in range(1, 101)] + [step(lr=1e-6)] * 50
    assert warned(series) == {110: ["kl", "loss"]}  # the rate of step 100 is the full one


def test_skipped_steps_do_not_count_as_being_stuck() -> None:
    series = [step(grad_norm=1.0 if number % 2 == 0 else None) for number in range(1, 101)]
    assert warned(series) == {20: ["kl", "loss"]}  # steps 2, 4, ... 20 count


def test_kl_of_zero_with_rewards_that_stay_together() -> None:
    # both classes move by the same amount, further than a loss that is stuck
    assert warned([step(-0.05, -0.06)] * 100) == {11: ["kl"]}
    assert warned([step(-0.05, -0.075)] * 100) == {}
    assert warned([step(-0.05, -0.06, kl=0.01)] * 100) == {}


def test_one_step_with_a_kl_estimate_is_enough() -> None:
    flat = step(-0.05, -0.06)
    assert warned([flat] * 5 + [step(-0.05, -0.06, kl=0.001)] + [flat] * 100) == {}


def test_kl_of_zero_in_batches_of_one_class() -> None:
    assert warned([step(0.0, None), step(None, 0.0)] * 50) == {11: ["kl", "loss"]}
    assert warned([step(0.0, None), step(None, -0.1)] * 50) == {}
    assert warned([step(0.0, None)] * 50) == {10: ["class"], 11: ["kl", "loss"]}
    assert warned([step(0.1, None)] * 50) == {10: ["class"]}


def test_loss_stuck_although_kl_is_not_zero() -> None:
    series = [step()] + [step(0.004 * (-1) ** number, 0.003, kl=0.002) for number in range(100)]
    assert warned(series) == {11: ["loss"]}


def test_loss_that_one_class_moves_is_not_stuck() -> None:
    assert warned([step(0.012, -0.005, kl=0.002)] * 100) == {}
    assert warned([step(0.005, -0.012, kl=0.002)] * 100) == {}
    assert warned([step(0.012, None, kl=0.002), step(None, -0.012, kl=0.002)] * 50) == {}


def test_loss_that_returns_to_its_start_later_is_not_stuck() -> None:
    # a reference that moves to where the policy is, at the end of a run
    assert warned([*learning(50), *[step()] * 50]) == {}


def test_rewards_of_both_classes_falling() -> None:
    falling = [step(-0.05 * number, -0.06 * number, kl=0.1) for number in range(40)]
    # means over steps 2 to 11 are -0.275 and -0.33, over steps 12 to 21 -0.775 and -0.93: below -0.3 both
    assert warned(falling) == {21: ["rewards"]}


def test_rewards_that_fall_at_once_and_stay_there() -> None:
    assert warned([step()] + [step(-3.0, -4.0, kl=0.1)] * 50) == {11: ["rewards"]}


def test_rewards_that_fall_after_a_resume() -> None:
    before = [moving(0.4, -1.0)] * 11
    assert warned([*before, *[moving(-0.1, -1.4)] * 20]) == {21: ["rewards"]}
    assert warned([*before, *[moving(0.05, -1.4)] * 20]) == {}  # still above the reference
    assert warned([moving(-2.0, -3.0)] * 31) == {}  # low, but not falling


def test_rewards_of_one_class_falling_is_what_training_is_for() -> None:
    assert warned([step()] + [step(-0.25, -5.0, kl=0.1)] * 50) == {}
    assert warned([step()] + [step(-5.0, -0.25, kl=0.1)] * 50) == {}


def test_zero_gradient() -> None:
    series = [moving(), moving(grad_norm=0.0), moving(), *[moving(grad_norm=0.0)] * 10]
    assert warned(series) == {5: ["gradient"]}
    assert warned([moving(grad_norm=1e-16)] * 50) == {2: ["gradient"]}  # sigmoids at their ends leave such norms


def test_zero_gradient_in_single_steps() -> None:
    assert warned([moving(), moving(grad_norm=0.0)] * 50) == {}
    assert warned([moving(grad_norm=1e-6)] * 50) == {}


def test_zero_gradient_between_skipped_steps() -> None:
    assert warned([moving(grad_norm=0.0), moving(grad_norm=None), moving(grad_norm=0.0)]) == {3: ["gradient"]}


def test_batches_of_weight_zero_have_no_gradient() -> None:
    assert warned([moving(), *[moving(grad_norm=0.0, loss=0.0)] * 5] * 10) == {}


def test_exploding_margins() -> None:
    series = [moving(), moving(11.0, -10.0), moving(), *[moving(30.0, -70.0)] * 10]
    assert warned(series) == {5: ["margins"]}


def test_margins_that_explode_the_wrong_way_round() -> None:
    assert warned([moving(), *[moving(-15.0, 15.0)] * 5]) == {3: ["margins"]}


def test_large_margins_and_single_outliers_are_healthy() -> None:
    assert warned([moving(9.0, -11.0)] * 50) == {}
    assert warned([moving(200.0, -200.0), moving()] * 50) == {}


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_missing_class(missing: str) -> None:
    series = [moving()] * 3 + [moving(**{missing: None})] * 30 + [moving()] * 3 + [moving(**{missing: None})] * 30
    assert warned(series) == {13: ["class"]}


def test_class_that_is_missing_nearly_long_enough() -> None:
    assert warned([*[moving(rejected=None)] * 9, moving()] * 20) == {}
    assert warned([*[moving(rejected=None)] * 9, *[moving(chosen=None)] * 9] * 20) == {}


def test_each_kind_comes_once_even_if_its_cause_comes_again() -> None:
    sick = [
        *[step(grad_norm=0.0)] * 11,
        *[step(-30.0, -1.0)] * 30,
        *[step(-40.0, None)] * 30,
        *[moving()] * 30,
        *[step(grad_norm=0.0)] * 30,
        *[step(-90.0, -30.0)] * 30,
        *[step(None, -40.0)] * 30,
    ]
    kinds = [kind for at_step in warned(sick).values() for kind in at_step]
    assert sorted(kinds) == sorted(WARNINGS)


def test_default_patience_is_fifty_steps_after_the_first() -> None:
    diagnosis = Diagnosis()
    counts = [len(diagnosis.update(step())) for _ in range(60)]
    assert counts == [0] * 50 + [2] + [0] * 9


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="patience must be at least 1, not 0"):
        Diagnosis(patience=0)


def test_texts_say_what_was_measured() -> None:
    diagnosis = Diagnosis(patience=1)
    diagnosis.update(step())
    (text,) = diagnosis.update(step(-1.25, -2.5, kl=0.1))
    assert text.startswith(
        "The rewards of both classes are falling: from 0.00 to -1.25 for thumbs-up answers, from 0.00 to -2.50"
    )


def spikes_of(norms: list[float]) -> dict[int, str]:
    """Return step -> what was said."""
    spikes = GradientSpikes(factor=10, window=6, most=3)
    said = ((step, spikes.update(norm, step=step)) for step, norm in enumerate(norms, start=1))
    return {step: text for step, text in said if text is not None}


def test_a_spike_is_ten_times_the_median_and_said_once() -> None:
    quiet = [1.0, 1.2, 0.8]
    assert spikes_of([100.0, 50.0, 1e6]) == {}  # nothing to compare with
    said = spikes_of([*quiet, 10.1, 30.0, 1.0, 9.9, 1.0, 99.0])
    assert list(said) == [4, 9]
    assert "step 4 is a spike: its norm is 10.1, and the median of the 3 steps before 1." in said[4]
    assert "model.optim.lr" in said[4]


def test_gradients_that_stay_larger_are_no_spike() -> None:
    """The median follows; and zeros have no multiples."""
    assert list(spikes_of([1.0] * 6 + [20.0] * 20)) == [7]
    assert spikes_of([0.0] * 6 + [1.0]) == {}


def test_spikes_are_not_said_for_ever() -> None:
    said = spikes_of([1.0, 1.0, 1.0] + [100.0, 1.0, 1.0] * 9)
    assert len(said) == 3
    assert [step for step, text in said.items() if "Further ones are not said" in text] == [max(said)]


def test_every_key_that_a_text_names_exists() -> None:
    keys = leaf_values(KTOConfig())
    for text in WARNINGS.values():
        filled = text.replace("{weight}", "undesirable")
        named = [word.strip(".,;").split("=")[0] for word in filled.split() if word.startswith(("model.", "trainer."))]
        assert named
        assert set(named) <= keys.keys(), set(named) - keys.keys()


def test_every_warning_is_a_heading_of_the_page() -> None:
    headings = {line.removeprefix("### ") for line in PAGE.splitlines()}
    assert KINDS.keys() <= headings, KINDS.keys() - headings


def test_every_key_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:model|trainer|exp_manager|export)\.[a-z_.]+)", PAGE))
    known = leaf_values(KTOConfig())
    sections = {key.rpartition(".")[0] for key in known}
    assert len(named) > 20
    assert named <= known.keys() | sections, named - known.keys() - sections


def messages():
    """Yields the strings of the package, what is filled in as one sign."""
    for file in (REPOSITORY / "nemo_kto").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                yield re.sub("…+", "…", "".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_that_the_page_quotes_exists() -> None:
    quotes = [" ".join(quote.replace("\n> ", " ").split()) for quote in re.findall(r"(?<=\n\n> )(?:.|\n> )*", PAGE)]
    known = list(messages())
    assert len(quotes) == 13
    for quote in quotes:
        assert any(quote in text for text in known), quote

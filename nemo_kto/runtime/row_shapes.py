"""The shapes of what pipeline stages send each other: known from the rows of a pass, so that nobody has to ask.

Rows differ in length. Megatron-Core (`P2PCommunicator._communicate_shapes`, 0.16 to 0.19) therefore sends the shape of
each tensor before the tensor, and waits on both sides until the device has done all it was given. Under an
interleaved schedule it does not even work with two stages: it takes the shape of a gradient for that of an activation.
But every rank knows the rows of a pass, and Megatron's schedules work on them in an order that is known as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.schedules import get_schedule_table


@dataclass
class _Expected:
    """What comes to this rank in a pass: the tokens of each activation, and of each gradient, in their order."""

    activations: Iterator[int]
    gradients: Iterator[int]
    hidden_size: int


_expected: _Expected | None = None


def exchange_no_shapes() -> None:
    """Let Megatron's stages take the shapes from `known`; idempotent."""
    p2p_communication.P2PCommunicator._communicate_shapes = _known_shapes


@contextmanager
def known(
    tokens: Sequence[int], *, hidden_size: int, stages: int, chunks: int, is_first: bool, is_last: bool
) -> Iterator[None]:
    """Tell what is sent while the block runs a pass.

    Args:
        tokens: What one rank of a stage has of each micro-batch.
        hidden_size: Channels of a token.
        stages: Pipeline stages.
        chunks: Chunks of the model on each of them.
        is_first: Whether this rank is on the first stage.
        is_last: Whether it is on the last one.
    """
    global _expected
    # the same table as the schedule's; Megatron's micro-batches of a group are as many as there are stages
    order = get_schedule_table(len(tokens), chunks, stages)
    expected = _Expected(
        # the first chunk of the first stage takes tokens; backwards the chunks take turns the other way round
        activations=iter([tokens[row] for row, chunk in order if not (is_first and chunk == 0)]),
        gradients=iter([tokens[row] for row, turn in order if not (is_last and turn == 0)]),
        hidden_size=hidden_size,
    )
    _expected = expected
    try:
        yield
    finally:
        _expected = None
    assert stages == 1 or next(expected.activations, None) is None, "a pass has not received all activations"


def _known_shapes(
    self: Any, to_next: Any, to_prev: Any, recv_prev: bool, recv_next: bool
) -> tuple[list[int], list[int]]:
    """Return the shapes of what comes from the previous and from the next stage; zeros where nothing comes."""
    assert _expected is not None, "a pass of the pipeline whose rows are not known"
    expected = _expected

    def shape(tokens: Iterator[int]) -> list[int]:
        return [next(tokens), 1, expected.hidden_size]

    nothing = [0, 0, 0]
    return shape(expected.activations) if recv_prev else nothing, shape(expected.gradients) if recv_next else nothing

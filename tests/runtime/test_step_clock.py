"""Where a step's time goes, by a clock that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_kto.runtime import step_clock
from nemo_kto.runtime.step_clock import GRADIENT_SYNC, GRADIENTS, KL, StepClock, StepTimes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return what the clock is going to say, the next one first."""
    said: list[float] = []
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: said.pop(0)))
    return said


def stage() -> Any:
    """Return a chunk whose passes end with what `sync_within` times."""
    return SimpleNamespace(config=SimpleNamespace(finalize_model_grads_func=lambda *_, **__: "done"))


def test_a_part_within_another_is_counted_once(ticks: list[float]) -> None:
    """Waits from 0 to 2, KL from 3 to 5, gradients from 6 to 12, of which 10 and 11 are the exchange; ends at 13."""
    ticks += [0, 2, 3, 5, 6, 10, 11, 12, 13]
    clock, chunk = StepClock(), stage()
    clock.begin(CPU)
    clock.has_data()
    with clock.part(KL):
        pass
    with clock.part(GRADIENTS), clock.sync_within([chunk]):
        assert chunk.config.finalize_model_grads_func([chunk], None) == "done"
    clock.finish()
    assert clock.last is not None and not ticks
    assert clock.last.seconds() == {"data": 2, "other": 3, "kl": 2, "gradients": 5, "gradient_sync": 1}


def test_a_step_that_fails_inside_leaves_the_clock_and_megatron_as_they_were(ticks: list[float]) -> None:
    ticks += [0, 1, 2, 3, 4, 10, 20]
    clock, chunk = StepClock(), stage()
    finalize = chunk.config.finalize_model_grads_func
    clock.begin(CPU)
    clock.has_data()
    with pytest.raises(ZeroDivisionError), clock.part(GRADIENTS), clock.sync_within([chunk]):
        raise ZeroDivisionError
    assert chunk.config.finalize_model_grads_func is finalize
    clock.finish()
    assert clock.last is not None and clock.last.seconds() == {"data": 1, "other": 2, "gradients": 1}
    clock.begin(CPU)  # the next step knows nothing of it
    clock.finish()
    assert clock.last.seconds() == {"data": 10}


def test_outside_of_a_step_nothing_is_counted(ticks: list[float]) -> None:
    """As in validation, which scores with the same code."""
    clock = StepClock()
    clock.has_data()
    with clock.part(KL):
        pass
    clock.finish()
    assert clock.last is None and not ticks


class Device:
    """A device that does what it is asked later: each event happens a second after the one before."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.done = 0

    def __call__(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.number = len(self.device.recorded)
        self.device.recorded.append(self)

    def elapsed_time(self, other: Event) -> float:
        if max(self.number, other.number) >= self.device.done:  # as CUDA does
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000.0 * (other.number - self.number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    def wait() -> None:
        found.done = len(found.recorded)

    monkeypatch.setattr(torch.cuda, "Event", found)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return found


class Logger:
    def __init__(self) -> None:
        self.written: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.written[step] = dict(metrics)


def steps(device: Device, clock: StepClock, trainer: Any, callback: StepTimes) -> Iterator[None]:
    """Take steps in which the host waits for the gradients, but not for the optimizer."""
    module: Any = SimpleNamespace(clock=clock, device=CUDA)
    while True:
        clock.begin(CUDA)
        clock.has_data()
        with clock.part(GRADIENTS):
            pass
        device.done = len(device.recorded)  # the metrics are asked for
        with clock.part("optimizer"):
            pass
        clock.finish()
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module)
        yield


def test_on_cuda_a_step_is_written_when_the_device_is_done_with_it(device: Device) -> None:
    logger, callback = Logger(), StepTimes()
    connector = SimpleNamespace(should_update_logs=True)
    trainer: Any = SimpleNamespace(global_step=0, loggers=[logger], _logger_connector=connector)
    run = steps(device, StepClock(), trainer, callback)
    next(run)
    assert logger.written == {}
    next(run)
    of_step = {f"train/time/{part}": 1.0 for part in ("data", "gradients", "optimizer")} | {"train/time/other": 3.0}
    assert logger.written == {0: of_step}
    connector.should_update_logs = False  # trainer.log_every_n_steps
    next(run)
    next(run)
    assert set(logger.written) == {0, 1}
    connector.should_update_logs = True
    next(run)
    callback.on_train_end(trainer, SimpleNamespace(device=CUDA))  # type: ignore[arg-type]
    assert logger.written == {0: of_step, 1: of_step, 4: of_step}


def test_names_of_parts_are_given_to_a_profiler() -> None:
    named: list[str] = []
    clock = StepClock()

    def name(part: str) -> Any:
        named.append(part)
        return torch.profiler.record_function(part)

    clock.named = name
    with clock.part(KL), clock.part(GRADIENT_SYNC):
        pass
    assert named == ["kl", "gradient_sync"]

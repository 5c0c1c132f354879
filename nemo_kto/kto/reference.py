"""The reference policy: how its log-probs are had without a second model.

While it is scored it is put into the live model, whose own code scores it: by exchanging weights (`cpu_swap`,
`resident`) or by switching adapters off (`adapter_off`). Or its log-probs were computed beforehand (`cached`), by that
same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.data.batches.reference_cache import Key, LogprobTable
from nemo_kto.data.batches.upload import upload
from nemo_kto.kto.scoring import RowScores
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.lora import adapters_off


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where log-probs of the reference are kept, and what they are computed from; see `ReferenceCache`."""

    folder: Path
    key: Key


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Which reference, and how it is held.

    Attributes:
        mode: `cpu_swap`, `resident`, `adapter_off` or `cached`.
        model_folder: Hugging Face folder of a reference that is another model than the one training starts from.
        adapter_folder: PEFT folder of a reference that is the base model with adapters.
        cache: With `cached`; None until the data is known.
        sync_every: The reference moves towards the policy every that many steps; None for never.
        sync_alpha: See `ExchangedReference.move`.
    """

    mode: str
    model_folder: Path | None = None
    adapter_folder: Path | None = None
    cache: CacheSettings | None = None
    sync_every: int | None = None
    sync_alpha: float = 1.0


Scores = tuple[torch.Tensor | list[RowScores] | None, torch.Tensor | list[RowScores] | None]
"""Scores of the KL set, None if there is none, and of the samples: log-probs `[n]` float32, or those of the tokens of
each row. None except on the last pipeline stage."""


class ReferencePolicy(Protocol):
    """Anything that knows the reference's log-probs of a batch."""

    def log_probs(self, batch: KTOBatch, split: str, *, score: Callable[[], Scores]) -> Scores:
        """Return the reference's log-probs of this rank's share of a batch.

        Args:
            batch: The share.
            split: "train" or "validation".
            score: Scores the same share with the live model as it is.
        """
        ...


class LiveReference(ABC):
    """A reference that is put into the live model."""

    @abstractmethod
    def activated(self) -> AbstractContextManager[None]:
        """Return a context manager inside which the live model is the reference; the policy comes back in any case."""

    def log_probs(self, batch: KTOBatch, split: str, *, score: Callable[[], Scores]) -> Scores:
        """Score the batch inside `activated`."""
        with self.activated():
            return score()


class AdapterOffReference(LiveReference):
    """The base model, which the adapters leave as it is. Memory: none.

    Args:
        models: This rank's chunks.
    """

    def __init__(self, models: Sequence[KTOGPTModel]) -> None:
        self._models = list(models)

    def activated(self) -> AbstractContextManager[None]:
        """Switch the adapters off."""
        return adapters_off(self._models)


class ExchangedReference(LiveReference):
    """Holds copies of parameters, as they are now, and exchanges them with the live ones' contents and back.

    Whatever is written into the parameters inside `activated` stays in the copies.

    Args:
        parameters: Those in which policy and reference differ, and the routers' biases, which are none.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self._stored = [self._copy(parameter) for parameter in self._parameters]

    @contextmanager
    def activated(self) -> Iterator[None]:
        """Exchange policy and reference, and exchange them back at the end, also when the block raises."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Replace the reference by alpha * policy + (1 - alpha) * reference (the soft update of arXiv 2404.09656).

        The sum is made in float32 and rounded to the parameters' dtype.
        """
        self._settle()
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            policy = parameter.to(stored.device, torch.float32)
            stored.copy_(alpha * policy + (1 - alpha) * stored.float())

    def sharded_state_dict(self, model: torch.nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state dict of `model` with the reference's values, under names that say so."""
        self._settle()
        stored = {id(parameter): copy for parameter, copy in zip(self._parameters, self._stored, strict=True)}
        state = {
            name: value
            for name, value in model.sharded_state_dict(metadata=metadata).items()  # type: ignore[operator]
            if isinstance(value, ShardedTensor | ShardedTensorFactory)
        }
        for value in state.values():
            copy = stored[id(value.data)]
            # pinned memory is shared with the process that writes in the background, while the reference is exchanged
            value.data = copy.clone() if copy.is_pinned() else copy
        add_prefix_for_sharding(state, "reference.")
        return state

    def load_state_dict(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what was loaded by way of `sharded_state_dict`."""
        self._settle()
        place = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        parameters = model.state_dict(keep_vars=True)
        for name, value in state.items():
            self._stored[place[id(parameters[name])]].copy_(value)

    @staticmethod
    @abstractmethod
    def _copy(parameter: torch.Tensor) -> torch.Tensor:
        """Return the copy of a parameter that is kept."""

    @abstractmethod
    def _exchange(self) -> None:
        """Exchange the parameters' contents with the kept copies; twice restores both exactly."""

    def _settle(self) -> None:
        """Wait until the kept copies have the contents that they were given."""


class CpuSwapReference(ExchangedReference):
    """Keeps the reference in CPU memory (pinned for CUDA) and exchanges the contents with the live parameters.

    Memory: one copy of the parameters in CPU memory, plus two parameters on the device while they are exchanged. The
    parameters keep their storage, so views into them stay valid. On CUDA one parameter leaves while the next comes in,
    and nobody waits for either: `_settle` does, before the CPU touches the kept copies.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters)
        on_cuda = any(parameter.is_cuda for parameter in self._parameters)
        self._outward = torch.cuda.Stream() if on_cuda else None

    @staticmethod
    def _copy(parameter: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=parameter.is_cuda)
        return copy.copy_(parameter.detach())

    @torch.no_grad()
    def _exchange(self) -> None:
        if self._outward is not None:
            self._exchange_on_streams(self._outward)
            return
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(stored)
            stored.copy_(live)

    def _exchange_on_streams(self, outward: torch.cuda.Stream) -> None:
        """Exchange all, each by way of one of two pieces of memory that take turns, so that few are on the device."""
        inward = torch.cuda.current_stream()
        largest = max(parameter.numel() * parameter.element_size() for parameter in self._parameters)
        memory = [torch.empty(largest, dtype=torch.uint8, device=self._parameters[0].device) for _ in range(2)]
        left: list[torch.cuda.Event | None] = [None, None]
        for number, (parameter, stored) in enumerate(zip(self._parameters, self._stored, strict=True)):
            turn = number % 2
            live = memory[turn][: parameter.numel() * parameter.element_size()].view(parameter.dtype)
            live = live.view(parameter.shape)
            if (event := left[turn]) is not None:
                inward.wait_event(event)
            live.copy_(parameter)
            parameter.copy_(stored, non_blocking=True)
            outward.wait_stream(inward)  # until `stored` has been read
            with torch.cuda.stream(outward):
                stored.copy_(live, non_blocking=True)
            left[turn] = outward.record_event()
        inward.wait_stream(
            outward
        )  # before the two pieces are used for anything else, and the copies for the way back

    def _settle(self) -> None:
        if self._outward is not None:
            self._outward.synchronize()


class ResidentReference(ExchangedReference):
    """Keeps the reference on the parameters' device and exchanges pointers: nothing is copied.

    Memory: one copy of the parameters on the device.
    """

    @staticmethod
    def _copy(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().clone()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._stored[index] = self._stored[index], parameter.data


EXCHANGED = {"cpu_swap": CpuSwapReference, "resident": ResidentReference}
"""Mode -> class."""


class CachedReference:
    """Log-probs that were computed beforehand. Memory: 12 bytes for each of them, in CPU memory.

    Args:
        tables: Split -> log-probs, complete for the run.
    """

    def __init__(self, tables: Mapping[str, LogprobTable]) -> None:
        self._tables = tables

    def log_probs(self, batch: KTOBatch, split: str, *, score: Callable[[], Scores]) -> Scores:
        """Look the batch up."""
        table, device = self._tables[split], batch.weights.device
        samples, kl = upload([table.look_up(*batch.pairs.T), table.look_up(*batch.kl_pairs.T)], device)
        return (kl if batch.kl_samples else None), samples

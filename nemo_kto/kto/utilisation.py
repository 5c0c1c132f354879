"""How much of the GPUs' peak rate training uses: model FLOPs utilisation (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_kto.algorithms.metrics import MetricSums
from nemo_kto.data.batches.packed_rows import Document, KTOBatch
from nemo_kto.data.batches.upload import upload
from nemo_kto.network.flops import StepFlops
from nemo_kto.runtime.devices import peak_flops

HALF = (torch.bfloat16, torch.float16)
"""Dtypes that the peak is of."""


class Utilisation:
    """Counts the operations of the documents of training steps, and sets them beside the peak.

    Args:
        work: What documents take.
        peak: Operations per second of all devices together; None where it is not known: then nothing is counted.
    """

    def __init__(self, work: StepFlops | None = None, *, peak: float | None = None) -> None:
        self._work = work
        self._peak = peak

    @classmethod
    def on(cls, device: torch.device, work: StepFlops, *, dtype: torch.dtype, devices: int) -> Utilisation:
        """Return it for a run on so many such devices."""
        known = device.type == "cuda" and dtype in HALF
        peak = peak_flops(torch.cuda.get_device_name(device)) if known else None
        return cls(work, peak=None if peak is None else devices * peak)

    def add(self, sums: MetricSums, batch: KTOBatch) -> None:
        """Add the operations of this rank's share of a batch, of documents that count, to the sum `flops`."""
        if self._work is None or self._peak is None:
            return
        work = self._work
        of_samples = [work.of_sample(*lengths) for lengths in _lengths(batch.samples)]
        of_kl = [work.of_kl(*lengths) for lengths in _lengths(batch.kl_samples)]
        operations = [torch.tensor(each, dtype=torch.float64) for each in (of_samples, of_kl)]
        weights = (batch.weights, batch.kl_weights)
        for values, counted in zip(upload(operations, batch.weights.device), weights, strict=True):
            sums.add("flops", values, counted)

    def metrics(self, flops: float | None, *, seconds: float) -> dict[str, float]:
        """Return `mfu`: which share of the peak, 0 to 1, a step's operations are in its time; nothing if unknown."""
        return {} if flops is None or self._peak is None else {"mfu": flops / seconds / self._peak}


def _lengths(documents: Sequence[Document]) -> list[tuple[int, int]]:
    return [(prompt.numel() + response.numel(), response.numel()) for prompt, response in documents]

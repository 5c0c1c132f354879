"""Adam whose state takes less of a GPU: moments of two bytes instead of four, or state in the host's memory.

It has the interface by which Megatron's distributed optimizer works with Transformer Engine's Adam where that keeps
the float32 parameters itself (Megatron calls it precision-aware): parameters are this rank's shards of the model's
own, gradients are their `decoupled_grad`, and checkpoints are made of `get_unscaled_state` and filled by
`set_scaled_state`. Both are float32, so a checkpoint is that of every other run: it can be read with other settings,
under another layout, and by Transformer Engine's and torch's Adam.

An update is torch's own, on float32 numbers. Each number's is its own: which of them a rank holds, and which lie
where, does not matter to any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim.adamw import adamw

AT_ONCE = 2**23
"""Numbers that are updated together: what is converted for it, or on its way to the host, takes so much memory."""

_ALIGNED = 64
"""Numbers that any processor's vectors divide."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "master_param"

Pieces = list[tuple[torch.Tensor, slice]]
"""Shards of parameters, and the part of each."""


class FrugalAdam(torch.optim.AdamW):
    """AdamW for Megatron's distributed optimizer.

    Args:
        params: Parameter groups. Megatron puts this rank's shards, which are vectors, in the place of parameters.
        moments_dtype: What the two running means are kept in.
        offload_fraction: Share of the shards whose state lies in the host's memory, where they are then updated. No
            shard is divided, and it is never more than this share.
        adam_w_mode: Megatron says so to Transformer Engine's Adam; weight decay is always decoupled here.
        **settings: torch's.

    Attributes:
        host: What makes a tensor in the host's memory, in the block that it returns.
    """

    def __init__(
        self,
        params: Any,
        *,
        moments_dtype: torch.dtype,
        offload_fraction: float,
        adam_w_mode: bool = True,
        **settings: Any,
    ) -> None:
        assert adam_w_mode
        super().__init__(params, fused=True, **settings)
        self.moments_dtype = moments_dtype
        self.offload_fraction = offload_fraction
        self.host: Callable[[], AbstractContextManager[None]] = nullcontext
        self._on_host: set[torch.Tensor] = set()
        self._staging: list[torch.Tensor] = []
        for group in self.param_groups:
            group["bias_correction"] = True  # which Transformer Engine's Adam looks for in a checkpoint

    def allocate(self) -> None:
        """Make the state of all shards, of zeros and of the parameters as they are now, unless it is there."""
        shards = [shard for group in self.param_groups for shard in group["params"]]
        room = self.offload_fraction * sum(shard.numel() for shard in shards)
        for shard in sorted(shards, key=torch.numel, reverse=True):  # the small ones fill what is left
            there = shard.numel() <= room
            room -= shard.numel() if there else 0
            if not self.state[shard]:
                self.state[shard].update(self._state_of(shard.detach(), there))
                with self.host():
                    self.state[shard]["step"] = torch.zeros((), dtype=torch.float32)
                if there:
                    self._on_host.add(shard)

    def _state_of(self, shard: torch.Tensor, on_host: bool) -> dict[str, torch.Tensor]:
        if on_host:
            with self.host():
                master = _in_host_memory(shard.numel(), torch.float32, pinned=False)  # copies go by way of `_staging`
                moments = {
                    name: _in_host_memory(shard.numel(), self.moments_dtype, pinned=False).zero_() for name in _MOMENTS
                }
            return {**moments, _MASTER: master.copy_(shard)}
        moments = {name: torch.zeros_like(shard, dtype=self.moments_dtype) for name in _MOMENTS}
        return {**moments, _MASTER: shard.float()}  # a float32 parameter is its own

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all shards that have a gradient."""
        assert closure is None
        self.allocate()
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            shards = [shard for shard in group["params"] if getattr(shard, "decoupled_grad", None) is not None]
            self._update_on_host(group, [shard for shard in shards if shard in self._on_host])
            self._update_on_device(group, [shard for shard in shards if shard not in self._on_host])
            for shard in group["params"]:
                self.state[shard]["step"].fill_(group["step"])

    def _update_on_device(self, group: Mapping[str, Any], shards: list[torch.Tensor]) -> None:
        for pieces in _batches(shards):
            self._update(group, pieces, [shard.decoupled_grad[part] for shard, part in pieces])  # type: ignore[attr-defined]
            for shard, part in pieces:
                if shard.dtype != torch.float32:
                    shard[part].copy_(self.state[shard][_MASTER][part])

    def _update_on_host(self, group: Mapping[str, Any], shards: list[torch.Tensor]) -> None:
        """Update shards whose state is in the host's memory, while the next ones' gradients are on their way there.

        What comes and goes takes turns in two pieces of memory. The device does all its copies one after the other,
        so gradients overwrite new parameters only when those have been sent.
        """
        batches = list(_batches(shards))
        arrived = [self._fetch(batches[0], 0)] if batches else []
        for turn, pieces in enumerate(batches):
            if turn + 1 < len(batches):
                arrived.append(self._fetch(batches[turn + 1], turn + 1))
            arrived[turn]()
            staged = self._staged(pieces, turn)
            self._update(group, pieces, staged)
            for (shard, part), memory in zip(pieces, staged, strict=True):
                updated = memory.view(shard.dtype)[: memory.numel()]
                updated.copy_(self.state[shard][_MASTER][part])
                shard[part].copy_(updated, non_blocking=True)

    def _fetch(self, pieces: Pieces, turn: int) -> Callable[[], None]:
        """Send gradients to the host; return what waits for them."""
        for (shard, part), memory in zip(pieces, self._staged(pieces, turn), strict=True):
            memory.copy_(shard.decoupled_grad[part], non_blocking=True)  # type: ignore[attr-defined]
        if not pieces[0][0].is_cuda:
            return lambda: None
        sent = torch.cuda.Event()
        sent.record()
        return sent.synchronize

    def _staged(self, pieces: Pieces, turn: int) -> list[torch.Tensor]:
        """Return the memory of the host, in float32, that the pieces' gradients have this turn."""
        if not self._staging:
            most = min(AT_ONCE, sum(shard.numel() for shard in self._on_host))
            with self.host():
                pinned = pieces[0][0].is_cuda
                self._staging = [_in_host_memory(most, torch.float32, pinned=pinned) for _ in range(2)]
        sizes = [part.stop - part.start for _, part in pieces]
        return list(self._staging[turn % 2][: sum(sizes)].split(sizes))

    def _update(self, group: Mapping[str, Any], pieces: Pieces, gradients: list[torch.Tensor]) -> None:
        """Update float32 parameters and moments of pieces, where they are."""
        kept = [{name: self.state[shard][name][part] for name in (*_MOMENTS, _MASTER)} for shard, part in pieces]
        masters = [state[_MASTER] for state in kept]
        on_host = pieces[0][0] in self._on_host
        with self.host() if on_host else nullcontext():
            means, squares = ([state[name].float() for state in kept] for name in _MOMENTS)
            done = torch.full((len(pieces),), group["step"] - 1.0, device=masters[0].device)
            adamw(
                masters,
                gradients,
                means,
                squares,
                [],
                list(done.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        if self.moments_dtype != torch.float32:
            for state, mean, square in zip(kept, means, squares, strict=True):
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)

    # what Megatron calls

    def get_unscaled_state(self, shard: torch.Tensor, name: str) -> torch.Tensor:
        """Return a moment, the parameters or the step as float32."""
        return self.state[shard][name].float()  # type: ignore[no-any-return]

    def set_scaled_state(self, shard: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Take over a moment, the parameters or the step."""
        with torch.no_grad():
            self.state[shard][name].copy_(value)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the groups' settings and steps; the state of shards comes by `set_scaled_state`.

        torch's would convert it to the parameters' dtype, and move it to their device.
        """
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
            for shard in group["params"]:
                if self.state[shard]:
                    self.state[shard]["step"].fill_(group.get("step", 0))


def _in_host_memory(number: int, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    return torch.empty(number, dtype=dtype, device="cpu", pin_memory=pinned)


def _batches(shards: list[torch.Tensor]) -> Iterator[Pieces]:
    """Yield pieces of shards, at most `AT_ONCE` numbers together.

    Shards are cut where the processor's vectors end: the numbers of the last one, if it is not full, are rounded in
    another way.
    """
    pieces: Pieces = []
    room = AT_ONCE
    for shard in shards:
        start = 0
        while start < shard.numel():
            left = shard.numel() - start
            taken = left if left <= room else room - room % _ALIGNED
            if taken:
                pieces.append((shard, slice(start, start + taken)))
                room, start = room - taken, start + taken
            if start < shard.numel():
                yield pieces
                pieces, room = [], AT_ONCE
    if pieces:
        yield pieces

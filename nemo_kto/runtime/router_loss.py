"""What the routers' load-balancing loss was, from Megatron's tracker."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

from nemo_kto.runtime.parallel import RankPosition

_NAME = "load_balancing_loss"


def take_mean(*, num_layers: int, num_micro_batches: int, place: RankPosition) -> float:
    """Return the mean of the loss, without its weight, over layers and micro-batches of all ranks, and start anew.

    Megatron adds it up in passes that make gradients only. Each tensor-parallel rank has the part of its tokens, each
    stage that of its layers; a stage without experts takes part as well. One all-reduce of a float over the world.

    Args:
        num_layers: Layers with experts, of all stages.
        num_micro_batches: Micro-batches of each data-parallel rank since the last call.
        place: This process's place in the layout.
    """
    tracked = get_moe_layer_wise_logging_tracker().get(_NAME)
    total = torch.zeros((), device=torch.cuda.current_device()) if tracked is None else tracked["values"].sum()
    dist.all_reduce(total)
    clear_aux_losses_tracker()
    return total.item() / (num_layers * num_micro_batches * place.dp_size)


def forget() -> None:
    """Start anew without a look at what was added up."""
    clear_aux_losses_tracker()

"""What statistics of a batch are summed with: masks, wide numbers, other ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in float32 at least, and (N, L, 1): 1 where there is no padding."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide, torch.ones_like(wide[..., :1]) if mask is None else mask.unsqueeze(-1).to(wide.dtype)


class _AllReduce(torch.autograd.Function):
    """Sum over all ranks; each rank's result depends on every rank's input, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, of the same shape; differentiable."""
    if ranks() > 1:
        total: Tensor = _AllReduce.apply(x)
        return total
    return x

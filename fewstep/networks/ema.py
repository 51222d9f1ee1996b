"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """``min(decay, (1 + n) / (10 + n))``: early averages forget the initial weights quickly."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


@torch.no_grad()
def ema_update(average: nn.Module, source: nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * source`` over parameters; buffers are copied.

    One fused call for all tensors; local shards of sharded parameters need no communication.
    """
    averaged = [_local(p) for p in average.parameters()]
    latest = [_local(p) for p in source.parameters()]
    current = [p.to(a.dtype) for a, p in zip(averaged, latest, strict=True)]
    torch._foreach_lerp_(averaged, current, 1 - decay)
    for kept, buffer in zip(average.buffers(), source.buffers(), strict=True):
        kept.copy_(buffer)


def _local(parameter: Tensor) -> Tensor:
    """This rank's shard of a sharded parameter; the same storage either way."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter

"""Sums over shards, with a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def sum_of_shards(parts: Tensor, like: DTensor) -> Tensor:
    """Adds up what each rank has of its shards; one collective a dimension that is sharded.

    Args:
        parts: this rank's, of any shape.
        like: a tensor that is sharded as those were that the parts come from.

    Returns:
        The sum, the same on all ranks. Its gradient goes to each rank's own part, once.
    """
    mesh = like.device_mesh
    groups = [mesh.get_group(i) for i, how in enumerate(like.placements) if how.is_shard()]
    return cast(Tensor, _SumOverRanks.apply(parts, groups))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
        total = parts.clone()
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # All ranks go on from the sum alike, so each has the whole gradient by it already.
        return gradients[0], None

"""What methods do to a batch's conditioning."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion import Backbone
from fewstep.diffusion.tables import expand_to


def drop_cond(backbone: Backbone, cond: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Replaces the condition of the samples marked in ``dropped (B,)`` by the null condition."""
    if not cond:
        return cond
    null = backbone.null_cond(cond)
    return {
        name: torch.where(expand_to(dropped, value), null[name], value)
        for name, value in cond.items()
    }


def in_float32(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditioning as networks and guidance compute with it; shards store half precision."""
    return {n: value.float() if value.is_floating_point() else value for n, value in cond.items()}

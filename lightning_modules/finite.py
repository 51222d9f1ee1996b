"""Undoing on the device, without waiting for it, updates that a NaN or an infinity would spoil."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


@torch.no_grad()
def neutralise(gradients: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Sets all gradients to zero, in place, unless their norm is finite; nothing is synchronised.

    Their bits are multiplied by one or zero as integers: NaN times zero would be NaN, and finite
    gradients stay as they are to the last bit. One fused operation for all tensors of a dtype.

    Args:
        gradients: of one role, float16, bfloat16, float32 or float64; sharded ones by shard.
        norm: their common norm, 0-dim, the same on every rank.

    Returns:
        whether the norm is finite, a 0-dim bool tensor on its device.
    """
    finite = torch.isfinite(norm)
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    for dtype in dict.fromkeys(gradient.dtype for gradient in local):
        bits = INTEGERS[dtype.itemsize]
        same = [gradient.view(bits) for gradient in local if gradient.dtype == dtype]
        torch._foreach_mul_(same, finite.to(bits))
    return finite


def skip_unless(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes the next step of a fused optimiser leave weights and states alone unless ``finite``.

    To any other optimiser zero gradients still mean a step: Adam goes on along its momentum, and
    weight decay works. It is finite, and as small as those are.

    Args:
        finite: from :func:`neutralise`.
        optimizer: of the role whose gradients they were.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # What torch.amp.GradScaler sets on such optimisers, without its scale.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]

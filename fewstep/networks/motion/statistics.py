"""Whether a trainable representation still represents anything."""

from __future__ import annotations

import torch
from torch import Tensor

# The loss trains a head to make two branches agree, which a head that forgets its input does best.
# A healthy one stays near where it began, at 1; left alone, MCM's falls to a fifth and below.
COLLAPSED_VARIANCE = 0.3


@torch.no_grad()
def motion_statistics(motion: Tensor, video: Tensor) -> dict[str, Tensor]:
    """How a representation compares with what it began as; no host waits for these numbers.

    Args:
        motion: ``M`` of a video, ``(B, ...)``.
        video: what ``M`` gave before it was trained: ``MotionRepresentation.untrained(video)``.

    Returns:
        Detached scalars in float32, means over samples, so that they are the same however a batch
        is split: ``motion_variance``, ``Var[M] / Var[video]``, and, if they are of one shape,
        ``motion_correlation``, Pearson's over a sample's elements (0 if either is constant).
    """
    represented, given = _centred(motion), _centred(video)
    variance, reference = represented.square().mean(1), given.square().mean(1)
    tiny = torch.finfo(torch.float32).tiny
    found = {"motion_variance": (variance / reference.clamp_min(tiny)).mean()}
    if motion.shape == video.shape:
        covariance = (represented * given).mean(1)
        spread = variance.sqrt() * reference.sqrt()  # whose product might underflow
        found["motion_correlation"] = (covariance / spread.clamp_min(tiny)).mean()
    return found


def _centred(values: Tensor) -> Tensor:
    wide = values.float().flatten(1)
    return wide - wide.mean(1, keepdim=True)

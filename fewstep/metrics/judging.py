"""Measures of guided samples: does a judge see what the guide sees, and are they still like data?

A low guidance loss proves little: a gradient can please the network it comes from and no other,
and it can leave the data behind. So what a guide says of its own samples is reported beside what
a judge says that had no part in making them, and beside their distance from data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.neighbours import blocks


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each sample's largest logit is that of its label, ``(N,)`` bool.

    Args:
        logits: ``(N, classes)``; of those with anything that is not finite, none is right.
        labels: ``(N,)`` integers.
    """
    if len(logits) != len(labels) or not len(labels):
        raise FewstepError(
            f"Accuracy needs a label for each sample; got {len(logits)} rows of logits and "
            f"{len(labels)} labels."
        )
    return logits.isfinite().all(1) & (logits.argmax(1) == labels.to(logits.device))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of samples that are :func:`correct`, a scalar between 0 and 1."""
    return correct(logits, labels).double().mean()


def nearest_distances(samples: Tensor, data: Tensor) -> Tensor:
    """Euclidean distance of each sample to the nearest datum, ``(N,)`` in float64.

    Args:
        samples: ``(N, ...)``.
        data: ``(M, ...)``, of the same shape a sample.
    """
    if samples.shape[1:] != data.shape[1:] or not len(data):
        raise FewstepError(
            f"Distances to data need samples of one shape; got {tuple(samples.shape[1:])} beside "
            f"{len(data)} of {tuple(data.shape[1:])}."
        )
    points, table = samples.flatten(1), data.flatten(1).to(samples.device)
    found = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    for rows, _, squared in blocks(points, table):
        found[rows] = torch.minimum(found[rows], squared.amin(1))
    return found.sqrt()


def nearest_distance_ratio(samples: Tensor, data: Tensor, held_out: Tensor) -> Tensor:
    """How far samples are from data, where 1 is as far as data it has not seen.

    The mean distance to the nearest of ``data``, over that of ``held_out`` real data. Well above 1
    the samples have left the data's manifold; near 0 they are copies. The ratio depends on how
    many data there are, so compare only values that were measured with the same.

    Args:
        samples: ``(N, ...)``.
        data: what distances are to, such as the training set, ``(M, ...)``.
        held_out: data that ``data`` does not hold, ``(L, ...)``.

    Returns:
        A scalar.

    Raises:
        FewstepError: if shapes differ, or if all held-out data are among ``data``.
    """
    usual = nearest_distances(held_out, data).mean()
    if not usual > 0:
        raise FewstepError(
            "All held-out data are also among the data that distances are measured to. Give data "
            "that are not, such as a validation set."
        )
    return nearest_distances(samples, data).mean() / usual.to(samples.device)

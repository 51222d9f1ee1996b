"""Statistics of one set of samples for several metrics at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from fewstep.metrics.base import Features, Metric, Samples, Statistics
from fewstep.metrics.ranks import Ranks


def share_features(metrics: Sequence[Metric]) -> list[Features]:
    """Lets metrics over the same features use one network; returns each network once."""
    found: dict[Hashable, Features] = {}
    for metric in metrics:
        if metric.features is not None:
            metric.features = found.setdefault(metric.features.identity(), metric.features)
    return list(found.values())


@torch.no_grad()
def collect(metrics: Sequence[Metric], batches: Iterable[Samples]) -> list[Statistics]:
    """Each metric's statistics of this rank's samples; every feature network sees each once.

    Args:
        metrics: whose features are loaded, shared ones by one network (:func:`share_features`).
        batches: of samples, on the device of the feature networks.
    """
    statistics = [metric.statistics() for metric in metrics]
    networks = share_features(metrics)
    for samples in batches:
        seen: dict[int, dict[str, Tensor]] = {id(n): n(samples) for n in networks}
        for metric, own in zip(metrics, statistics, strict=True):
            own.update(seen.get(id(metric.features), {}), samples)
    return statistics


def merged(statistics: Sequence[Statistics], ranks: Ranks) -> list[Statistics]:
    """Those of all ranks together; a collective."""
    return [own.merged(ranks) for own in statistics]

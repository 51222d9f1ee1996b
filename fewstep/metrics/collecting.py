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


class Collection:
    """Statistics that grow by batches; every feature network sees each sample once.

    Args:
        metrics: whose features are loaded, shared ones by one network (:func:`share_features`).

    Attributes:
        statistics: one entry a metric; metrics that need the same have the same object.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._networks = share_features(metrics)
        found: dict[Hashable, tuple[Features | None, Statistics]] = {}
        identities = [metric.statistics_identity() for metric in metrics]
        for identity, metric in zip(identities, metrics, strict=True):
            if identity not in found:
                found[identity] = (metric.features, metric.statistics())
        self._distinct = list(found.values())
        self.statistics: list[Statistics] = [found[identity][1] for identity in identities]

    @torch.no_grad()
    def update(self, samples: Samples) -> None:
        """Adds a batch, on the device of the feature networks."""
        seen: dict[int, dict[str, Tensor]] = {id(n): n(samples) for n in self._networks}
        for features, own in self._distinct:
            own.update(seen.get(id(features), {}), samples)


def collect(metrics: Sequence[Metric], batches: Iterable[Samples]) -> list[Statistics]:
    """Each metric's statistics of this rank's samples (:class:`Collection`)."""
    collection = Collection(metrics)
    for samples in batches:
        collection.update(samples)
    return collection.statistics


def merged(statistics: Sequence[Statistics], ranks: Ranks) -> list[Statistics]:
    """Those of all ranks together, complete on the first rank, each object once; a collective."""
    found: dict[int, Statistics] = {}
    for own in statistics:
        if id(own) not in found:
            found[id(own)] = own.merged(ranks)
    return [found[id(own)] for own in statistics]

"""The face of a metric that compares a set of samples with a reference set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""Stacks a tensor of every rank along a new first dimension; the same on all ranks."""


class Features(ABC):
    """A frozen map from decoded samples to feature vectors.

    Attributes:
        name: what metrics over these features are called by.
    """

    name: str

    @abstractmethod
    def prepare(self) -> None:
        """Fetches or trains whatever must lie on disk; called by one process only."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Loads the network onto a device, after :meth:`prepare`."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """``(B, ...)`` decoded samples to ``(B, D)`` features."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Which features these are, with a hash of their weights, in plain values."""


class Accumulator(ABC):
    """Collects one set of samples, a batch at a time."""

    @abstractmethod
    def update(self, samples: Tensor) -> None:
        """Adds a batch of decoded samples ``(B, ...)``."""

    @abstractmethod
    def compute(self, gather: Gather | None = None) -> float:
        """The metric of all samples so far, over all ranks; a collective if ``gather`` is given."""


class Metric(ABC):
    """A distance between generated samples and a reference set.

    Attributes:
        name: the metric's name in logs and results.
    """

    name: str

    @abstractmethod
    def prepare(self) -> None:
        """See :meth:`Features.prepare`."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """See :meth:`Features.load`."""

    @abstractmethod
    def set_reference(self, samples: Iterable[Tensor]) -> None:
        """Fixes the reference from batches of decoded samples."""

    @abstractmethod
    def accumulate(self) -> Accumulator:
        """A fresh, empty collection to be compared with the reference."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two values to be comparable, in plain values."""

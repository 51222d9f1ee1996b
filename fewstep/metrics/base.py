"""What a metric is made of: samples, features of them, statistics of a set, and a comparison.

A set of samples is seen a batch at a time and never kept whole: features are computed once for all
metrics that share a network, statistics are summed or gathered over ranks, and the comparison of
two sets' statistics gives the numbers.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fewstep.metrics.ranks import Ranks

Better = Literal["lower", "higher"]
Reference = Literal["data", "pairs", "none"]


@dataclass(frozen=True)
class Samples:
    """A batch of finished samples.

    Attributes:
        pixels: images ``(B, C, H, W)`` or videos ``(B, C, F, H, W)`` in [-1, 1], or vectors
            ``(B, D)``.
        numbers: ``(B,)`` int64 on the CPU: each sample's number in its set, the same however many
            ranks share the work.
        prompts: what each was asked for, where text was.
        cond: the conditions each was asked for, by name, ``(B, ...)``, where they are known.
    """

    pixels: Tensor
    numbers: Tensor
    prompts: Sequence[str] | None = None
    cond: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def numbers_of(keys: Sequence[str]) -> Tensor:
    """Numbers ``(B,)`` for records that are known by their keys, in no particular order."""
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the 8-bit values that a saved picture holds."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Features(ABC):
    """A frozen map from samples to features, held outside of every module tree.

    Attributes:
        name: what metrics over these features are called by.
    """

    name: str

    @abstractmethod
    def prepare(self) -> None:
        """Makes sure that whatever must lie on disk does; called by one process of each machine.

        Raises:
            FewstepError: if weights are missing, naming the file, its hash and where to get it.
        """

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Loads the network onto a device, after :meth:`prepare`."""

    @abstractmethod
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        """Named features ``(B, ...)``; networks for images give ``(B, F, ...)`` for videos."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Which features these are, with a hash of their weights, in plain values."""

    def identity(self) -> Hashable:
        """Equal for two that give the same features, so that one network serves both."""
        return id(self)

    def judges(self) -> Sequence[nn.Module]:
        """Networks that tell how good samples are, as far as they are loaded.

        None may have had a part in making them. This is ``network``; features that hold theirs
        elsewhere override it.
        """
        network = getattr(self, "network", None)
        return [network] if isinstance(network, nn.Module) else []

    def to(self, device: torch.device) -> None:
        """Moves the loaded network, so that it takes no GPU memory between evaluations.

        This moves ``network``; features that hold theirs elsewhere override it.
        """
        network = getattr(self, "network", None)
        if isinstance(network, nn.Module):
            network.to(device)
        if hasattr(self, "device"):
            self.device = device


class Statistics(ABC):
    """What a metric needs to know of one set of samples.

    Attributes:
        of_samples: whether they are of the samples alone, whatever features the metric has.
    """

    of_samples: ClassVar[bool] = False

    def identity(self) -> Hashable:
        """Equal for two that hold the same of the same features and samples."""
        return self

    @abstractmethod
    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        """Adds a batch."""

    @abstractmethod
    def merged(self, ranks: Ranks) -> Self:
        """Those of all ranks' samples together, a collective; complete on the first rank.

        What others get is at most as much, and may be empty: only the first rank computes.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All they hold, to be stored."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave."""


class Metric(ABC):
    """Numbers that tell of a set of samples, mostly by comparison with another set.

    Attributes:
        features: what it looks through; None for a metric of the samples themselves.
        reference: what a set is compared with. ``data``: the data set, or the teacher's samples.
            ``pairs``: samples that other weights or step counts made of the same noise.
        pairs: how many pairs are compared, for a metric of pairs.
        needs_prompts: whether samples must have prompts.
        needs_conditions: names of the conditions that samples must have.
        own_values: names of its values that the reference has no part in.
        better: the names of its values, and which way each is better.
    """

    features: Features | None = None
    reference: ClassVar[Reference] = "data"
    pairs: int = 256
    needs_prompts: bool = False
    needs_conditions: Sequence[str] = ()
    own_values: frozenset[str] = frozenset()
    better: Mapping[str, Better]

    def judges(self) -> Sequence[nn.Module]:
        """Networks that must have had no part in making the samples, as far as they are loaded."""
        return [] if self.features is None else self.features.judges()

    def guides(self) -> Sequence[nn.Module]:
        """Networks of which the values say that they guided, where samples are guided at all."""
        return []

    def check(self, num_samples: int) -> None:  # noqa: B027 - most metrics take any number
        """Complains before anything is sampled; called when a run starts.

        Raises:
            FewstepError: if so many generated samples are too few for the metric.
        """

    def statistics_identity(self) -> Hashable:
        """Equal for metrics that need the same statistics, so that one serves both."""
        own = self.statistics()
        through = None if own.of_samples or self.features is None else self.features.identity()
        return (own.identity(), through)

    @abstractmethod
    def statistics(self) -> Statistics:
        """Statistics of no samples yet."""

    @abstractmethod
    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        """The values by name, from the merged statistics of both sets.

        Raises:
            FewstepError: if a set is too small for the metric.
        """

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two values to be comparable, in plain values."""

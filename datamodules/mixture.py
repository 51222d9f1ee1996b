"""Samples of an analytic distribution, as an endless stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from fewstep.contracts import Batch, Conditions
from fewstep.errors import require_at_least
from fewstep.networks import ring
from fewstep.seeding import torch_generator


class _Draws(IterableDataset[Batch]):
    """Batch ``b`` is drawn from a generator of its own, so a stream can begin anywhere."""

    def __init__(
        self, data: RingData, stream: str, rank: int, start: int, stop: int | None
    ) -> None:
        self.data, self.stream, self.rank = data, stream, rank
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while self.stop is None or number < self.stop:
            yield self.data.batch(self.stream, number, self.rank)
            number += 1


class RingData(pl.LightningDataModule):
    """A ring of Gaussian modes in the plane; every mode is a class.

    Args:
        num_modes, radius, std: the ring (see :func:`fewstep.networks.mixture.ring`).
        batch_size: samples a device and update.
        reference_samples: size of the reference set for metrics.
        seed: of the samples.
    """

    def __init__(
        self,
        num_modes: int = 5,
        radius: float = 1.0,
        std: float = 0.1,
        batch_size: int = 512,
        reference_samples: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size)
        self.mixture = ring(num_modes, radius, std)
        self.batch_size = batch_size
        self.reference_samples = reference_samples
        self.seed = seed

    def batch(self, stream: str, number: int, rank: int = 0) -> Batch:
        """The ``number``-th batch of a stream: samples ``(B, 2)`` float32."""
        generator = torch_generator(self.seed, stream, number, rank)
        samples, labels = self.mixture.sample(self.batch_size, generator)
        keys = [f"{stream}-{number}-{rank}-{i}" for i in range(self.batch_size)]
        return {"sample": samples.float(), "cond": {"class_labels": labels}, "key": keys}

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless fresh samples, from the update that training is at."""
        assert self.trainer is not None
        draws = _Draws(
            self, "mixture-train", self.trainer.global_rank, self.trainer.global_step, None
        )
        return DataLoader(draws, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """A few fixed batches."""
        assert self.trainer is not None
        return DataLoader(
            _Draws(self, "mixture-val", self.trainer.global_rank, 0, 4), batch_size=None
        )

    def reference_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """Fixed samples of the distribution."""
        count = -(-self.reference_samples // self.batch_size)
        numbers = range(rank, count, world_size)
        return (self.batch("mixture-reference", number) for number in numbers)

    def reference_conditions(self, numbers: Sequence[int]) -> Conditions:
        """The modes by turns."""
        labels = torch.tensor(numbers) % len(self.mixture.means)
        return Conditions({"class_labels": labels})

    def reference_protocol(self) -> dict[str, Any]:
        """Which distribution the reference is drawn from."""
        return {
            "data": type(self).__name__,
            "modes": len(self.mixture.means),
            "records": -(-self.reference_samples // self.batch_size) * self.batch_size,
            "seed": self.seed,
        }

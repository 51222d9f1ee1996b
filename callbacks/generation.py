"""Samples for an evaluation: the same whatever the number of ranks and the size of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from fewstep.contracts import Batch, FewStepSampler, FinishedSet, ReferenceData
from fewstep.errors import FewstepError
from fewstep.metrics import Metric, Ranks, Samples, Statistics, collect, merged, numbers_of
from fewstep.seeding import torch_generator


@dataclass(frozen=True)
class Cell:
    """One cell of the evaluation's matrix: whose weights, how many steps, which noise."""

    role: str
    num_steps: int
    seed: int


def batches_of(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[range, bool]]:
    """A rank's batches of sample numbers, and whether each counts.

    All ranks get equally many, since sharded networks compute together; a rank that has run out
    repeats the first batch, which does not count.
    """
    size = max(1, min(batch_size, -(-num_samples // world_size)))
    starts = range(0, num_samples, size)
    for first in range(0, len(starts), world_size):
        mine = first + rank
        start = starts[mine] if mine < len(starts) else 0
        yield range(start, min(start + size, num_samples)), mine < len(starts)


@dataclass(frozen=True)
class Scene:
    """Where an evaluation takes place: a method that samples, and data to compare with.

    Attributes:
        batch_size: samples a rank makes at a time.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    batch_size: int

    @property
    def sampler(self) -> FewStepSampler:
        """The method, as evaluations know it."""
        return cast(FewStepSampler, self.module)

    @property
    def data(self) -> ReferenceData:
        """The datamodule.

        Raises:
            FewstepError: if it has no reference set.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReferenceData):
            raise FewstepError(
                f"{type(data).__name__} has no reference_batches(), so there is nothing to measure "
                "against; remove the Evaluation callback or use one of fewstep's datamodules."
            )
        return data

    def num_batches(self, num_samples: int) -> int:
        """How many batches each rank makes for so many samples."""
        world = self.trainer.world_size
        return sum(1 for _ in batches_of(num_samples, self.batch_size, 0, world))

    def generated(self, cell: Cell, num_samples: int) -> Iterator[Samples]:
        """This rank's share of a cell's samples, decoded.

        A sample's noise and condition are functions of (seed, its number) alone.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if isinstance(self.module, FinishedSet):
            for batch in self.module.finished_batches(rank, world):
                yield self._samples(batch["sample"], batch)
            return
        for numbers, counts in batches_of(num_samples, self.batch_size, rank, world):
            samples = self._batch(cell, numbers)
            if counts:
                yield samples

    def _batch(self, cell: Cell, numbers: Sequence[int]) -> Samples:
        sampler, device = self.sampler, self.module.device
        # Drawn on the CPU, so that the noise is the same on every kind of device.
        sources = [torch_generator(cell.seed, "evaluation-noise", n) for n in numbers]
        noise = torch.stack([torch.randn(sampler.sample_shape, generator=g) for g in sources])
        conditions = self.data.reference_conditions(numbers)
        cond = {name: value.to(device) for name, value in conditions.cond.items()}
        generators = [torch_generator(cell.seed, "evaluation-sampler", n) for n in numbers]
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            x0 = sampler.sample(
                noise.to(device),
                cond or None,
                cell.num_steps,
                generators,
                cell.role,
                conditions.prompt,
            )
            pixels = sampler.decode(x0)
        return Samples(pixels.float(), torch.tensor(numbers), conditions.prompt)

    def recorded(self) -> Iterator[Samples]:
        """This rank's share of the data set, decoded."""
        trainer: Any = self.trainer
        for batch in self.data.reference_batches(trainer.global_rank, trainer.world_size):
            with torch.no_grad():
                pixels = self.sampler.decode(batch["sample"].to(self.module.device))
            yield self._samples(pixels, batch)

    def _samples(self, pixels: Tensor, batch: Batch) -> Samples:
        pixels = pixels.to(self.module.device).float()
        return Samples(pixels, numbers_of(batch["key"]), batch.get("prompt"))

    def collected(self, metrics: Sequence[Metric], samples: Iterable[Samples]) -> list[Statistics]:
        """Each metric's statistics of all ranks' samples; a collective."""
        return merged(collect(metrics, samples), Ranks(self.module.device))

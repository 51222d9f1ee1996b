"""Samples for an evaluation: the same whatever the number of ranks and the size of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.preemption import leave_if_requested
from callbacks.together import on_every_rank
from fewstep.contracts import (
    Batch,
    FewStepSampler,
    FinishedSet,
    ReferenceData,
    SteeredSampler,
)
from fewstep.errors import FewstepError
from fewstep.metrics import Collection, Metric, Ranks, Samples, Statistics, merged, numbers_of
from fewstep.seeding import torch_generator


@dataclass(frozen=True)
class Cell:
    """One cell of the evaluation's matrix: whose weights, how many steps, which noise.

    Attributes:
        plain: whether it is sampled without training-free guidance in a run that has it, as a
            reference is.
    """

    role: str
    num_steps: int
    seed: int
    plain: bool = False

    def described(self) -> str:
        """What its samples are called in messages."""
        return f"samples of '{self.role}' at {self.num_steps} steps"


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

    def reference_cell(self, role: str, num_steps: int, seed: int) -> Cell:
        """A cell that others are compared with: what the method makes without being steered."""
        steered = isinstance(self.module, SteeredSampler) and self.module.is_steered()
        return Cell(role, num_steps, seed, plain=steered)

    def num_batches(self, num_samples: int) -> int:
        """How many batches each rank makes for so many samples."""
        world = self.trainer.world_size
        return sum(1 for _ in batches_of(num_samples, self.batch_size, 0, world))

    def generated(self, cell: Cell, num_samples: int) -> Iterator[Samples]:
        """This rank's share of a cell's samples, decoded.

        A sample's noise and condition are functions of (seed, its number) alone. All ranks step
        through it together: a run that is asked to stop leaves before a batch, and a rank that
        fails keeps step with the others to the end, where its error comes. Only where a sharded
        network fails on one rank alone do the others wait within it.

        Raises:
            FewstepError: at the end, if guidance diverged on this rank.
            Preempted: on all ranks, if the run is asked to stop.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if isinstance(self.module, FinishedSet):
            for batch in self.module.finished_batches(rank, world):
                yield self._samples(batch["sample"], batch)
            return
        failure: Exception | None = None
        for numbers, counts in batches_of(num_samples, self.batch_size, rank, world):
            leave_if_requested(self.trainer)
            if failure is not None:
                continue
            try:
                samples = self._batch(cell, numbers, counts)
            except Exception as error:  # raised when the others are through
                failure = error
                continue
            if counts:
                yield samples
        if failure is not None:
            raise failure
        if isinstance(self.module, SteeredSampler):
            self.module.check_guidance()

    def _batch(self, cell: Cell, numbers: Sequence[int], counts: bool) -> Samples:
        sampler, device = self.sampler, self.module.device
        # Drawn on the CPU, so that the noise is the same on every kind of device.
        sources = [torch_generator(cell.seed, "evaluation-noise", n) for n in numbers]
        noise = torch.stack([torch.randn(sampler.sample_shape, generator=g) for g in sources])
        conditions = self.data.reference_conditions(numbers)
        cond = {name: value.to(device) for name, value in conditions.cond.items()}
        generators = [torch_generator(cell.seed, "evaluation-sampler", n) for n in numbers]
        mode: AbstractContextManager[None] = nullcontext()
        if isinstance(self.module, SteeredSampler):
            mode = self.module.sampling_as(cell.plain, counts)
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context(), mode:
            x0 = sampler.sample(
                noise.to(device),
                cond or None,
                cell.num_steps,
                generators,
                cell.role,
                conditions.prompt,
            )
        with torch.no_grad():  # and without autocast, as records are decoded
            pixels = sampler.decode(x0)
        return Samples(pixels.float(), torch.tensor(numbers), conditions.prompt, conditions.cond)

    def recorded(self) -> Iterator[Samples]:
        """This rank's share of the data set as pixels; only latents are decoded."""
        trainer: Any = self.trainer
        for batch in self.data.reference_batches(trainer.global_rank, trainer.world_size):
            pixels = batch["sample"].to(self.module.device)
            if tuple(pixels.shape[1:]) == tuple(self.sampler.sample_shape):
                with torch.no_grad():
                    pixels = self.sampler.decode(pixels)
            yield self._samples(pixels, batch)

    def _samples(self, pixels: Tensor, batch: Batch) -> Samples:
        pixels = pixels.to(self.module.device).float()
        return Samples(pixels, numbers_of(batch["key"]), batch.get("prompt"))

    def collected(
        self, metrics: Sequence[Metric], samples: Iterable[Samples], what: str
    ) -> list[Statistics]:
        """Each metric's statistics of all ranks' samples, complete on the first; a collective.

        Args:
            metrics: whose statistics.
            samples: this rank's.
            what: they are, for messages; such as ``samples of the student at 4 steps``.

        Raises:
            FewstepError: on all ranks, if any failed, or if samples are no numbers.
        """
        work = partial(_own_statistics, metrics, samples)
        statistics, counts = on_every_rank(self.trainer, work)
        ranks = Ranks(self.module.device)
        bad, count = ranks.sum(torch.tensor(counts)).tolist()
        if bad:
            raise FewstepError(
                f"{bad} of {count} {what} are not finite (NaN or infinite), so that nothing can be "
                "measured. If they are a student's, it has diverged: go on from an earlier "
                "checkpoint with a lower learning rate or clipped gradients; in half precision, "
                "try float32."
            )
        return merged(statistics, ranks)


def _own_statistics(
    metrics: Sequence[Metric], samples: Iterable[Samples]
) -> tuple[list[Statistics], tuple[int, int]]:
    """This rank's statistics, and how many samples are not finite of how many.

    Samples are taken to the end whatever happens, since other ranks may be making theirs too.
    """
    collection = Collection(metrics)
    failure: Exception | None = None
    count, unusable = 0, torch.zeros(())
    for batch in samples:
        try:
            if failure is None:
                # An infinite or NaN sample would pass for a black or white picture.
                bad = ~batch.pixels.isfinite().flatten(1).all(1)
                unusable = bad.sum() + unusable.to(bad.device)  # read when all is done
                count += len(batch)
                collection.update(batch)
        except Exception as error:  # raised when the others are through
            failure = error
    if failure is not None:
        raise failure
    return collection.statistics, (int(unusable), count)

"""Best of N: several candidates for each sample, of which the energy's favourite is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion import Cond
from fewstep.diffusion.tables import expand_to
from fewstep.errors import FewstepError
from fewstep.guidance.augmentors import PLAIN, Augmentor
from fewstep.guidance.energies import Energy, Target
from fewstep.guidance.energies.base import repeated
from fewstep.guidance.freezing import frozen
from fewstep.guidance.sampler import GuidedSamples
from fewstep.guidance.smoothing import Objective
from fewstep.guidance.steps import FINISHED
from fewstep.guidance.trace import Costs, Trace
from fewstep.seeding import normal_like, torch_generator


class Keeper:
    """For each sample, what came with its lowest loss so far.

    Attributes:
        loss: the lowest, ``(B,)``; infinite where none was finite.
        chosen: number of the offer it came with, ``(B,)``.
        rows: what else came with it, each ``(B, ...)``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loss = self.chosen = torch.empty(0)
        self.rows: tuple[Tensor, ...] = ()

    def offer(self, loss: Tensor, *rows: Tensor) -> None:
        """Keeps rows ``(B, ...)`` where their loss ``(B,)`` is below all before.

        The first offer is kept in any case; a loss that is not finite never beats another.
        """
        loss = torch.where(loss.isfinite(), loss.detach(), torch.inf)
        if self.count == 0:
            self.loss, self.rows = loss, rows
            self.chosen = torch.zeros_like(loss, dtype=torch.long)
        else:
            better = loss < self.loss
            self.loss = torch.where(better, loss, self.loss)
            self.chosen = torch.where(better, self.count, self.chosen)
            self.rows = tuple(
                torch.where(expand_to(better, new), new, old)
                for new, old in zip(rows, self.rows, strict=True)
            )
        self.count += 1


class CandidateSampler(Protocol):
    """Draws samples: plain, guided, or from optimised noise.

    For instance ``lambda noise, cond, target, draws: guided_sample(student, noise, cond, times,
    guidance, target, draws)``.
    """

    def __call__(
        self,
        noise: Tensor,
        cond: Cond | None,
        target: Target,
        generator: Sequence[torch.Generator],
        /,
    ) -> GuidedSamples: ...


@dataclass(frozen=True)
class Selected(GuidedSamples):
    """The best of each sample's candidates, and how all of them did.

    The trace is that of the chosen candidates; its costs are those of all.

    Attributes:
        losses: of every candidate, ``(N, B)``; infinite where one was not finite.
        chosen: which was kept, ``(B,)``.
    """

    losses: Tensor
    chosen: Tensor

    def check(self) -> None:
        """Refuses a selection from nothing; waits for the device.

        Raises:
            FewstepError: if a sample has no candidate with a finite loss.
        """
        if not bool(self.losses.isfinite().any(0).all()):
            raise FewstepError(
                f"None of {len(self.losses)} candidates of a sample has a finite loss. Look for "
                "logarithms and divisions in the energy, or lower the guidance's strength."
            )


@dataclass(frozen=True)
class BestOf:
    """Draws ``count`` candidates for each sample and keeps the one with the lowest energy.

    Candidate ``k`` of sample ``n`` is a function of (seed, n, k) alone, whatever batch it is drawn
    in and on whichever rank: it has its own generator, which draws first its initial noise and
    then what its walk needs.

    The energy that ranks is the guide, so the choice can be as adversarial as a gradient is:
    report what a judge says as well.

    Args:
        count: candidates of each sample.
        energy: ranks them, without gradients.
        augmentor: ranks by the mean over random views, the same for all candidates of a sample.
        together: candidates of each sample in one batch.
    """

    count: int
    energy: Energy
    augmentor: Augmentor | None = None
    together: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.together < 1:
            raise FewstepError(
                "Best-of-N needs a count of 1 or more and 1 or more candidates together; got "
                f"count: {self.count}, together: {self.together}."
            )

    @torch.no_grad()
    def __call__(
        self,
        sampler: CandidateSampler,
        like: Tensor,
        numbers: Sequence[int],
        cond: Cond | None = None,
        target: Target = None,
        seed: int = 0,
        first: tuple[Tensor, Sequence[torch.Generator] | None] | None = None,
        check: bool = True,
    ) -> Selected:
        """Selects samples.

        Args:
            sampler: draws candidates.
            like: a tensor shaped, typed and placed like the initial noise, ``(B, ...)``.
            numbers: each sample's number in the whole run, ``B`` of them.
            cond, target: one row for each sample.
            first: noise ``(B, ...)`` and a generator for each sample that candidate 0 starts from,
                so that it is the sample there would be without selection; without generators it
                draws what its walk needs as the others do.
            check: see :meth:`Selected.check`; False leaves it to the caller.

        Raises:
            FewstepError: if the numbers are not one for each sample, or if a sample has no
                candidate with a finite loss.
        """
        if len(numbers) != len(like):
            raise FewstepError(
                f"{len(numbers)} numbers were given for {len(like)} samples; give each its own."
            )
        keeper, losses, costs = Keeper(), [], Costs(0, 0, 0)
        times: tuple[float, ...] = ()
        for lowest in range(0, self.count, self.together):
            candidates = range(lowest, min(lowest + self.together, self.count))
            start = self._start(like, numbers, candidates, seed, first)
            run = _drawn(sampler, *start, len(candidates), cond, target)
            times = run.trace.times
            costs = costs + run.trace.costs.for_each_of(len(candidates))
            for place in range(len(candidates)):
                rows = slice(place * len(like), (place + 1) * len(like))
                loss = self._rank(run.samples[rows], target, numbers, seed)
                keeper.offer(loss, run.samples[rows], *_columns(run.trace, rows))
                losses.append(torch.where(loss.isfinite(), loss, torch.inf))
        ranked = Costs(0, 0, self.count * Objective(self.energy, self.augmentor or PLAIN).views)
        samples, *columns = keeper.rows
        trace = _trace(times, columns, costs + ranked)
        found = Selected(samples, trace, torch.stack(losses), keeper.chosen)
        if check:
            found.check()
        return found

    @staticmethod
    def _start(
        like: Tensor,
        numbers: Sequence[int],
        candidates: range,
        seed: int,
        first: tuple[Tensor, Sequence[torch.Generator] | None] | None,
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Initial noise of candidates, those of one number after another, and their generators."""
        draws = [torch_generator(seed, "candidate", n, k) for k in candidates for n in numbers]
        noise = normal_like(_repeated(like, len(candidates)), draws)
        if first is not None and candidates.start == 0:
            noise[: len(like)] = first[0]
            draws[: len(like)] = first[1] or draws[: len(like)]
        return noise, draws

    def _rank(self, samples: Tensor, target: Target, numbers: Sequence[int], seed: int) -> Tensor:
        """The energy of one candidate of each sample, ``(B,)``, in the sample's own views."""
        views = [torch_generator(seed, "ranking", n) for n in numbers]
        objective = Objective(self.energy, self.augmentor or PLAIN)
        with frozen(self.energy):
            loss: Tensor = objective.drawn(samples, target, FINISHED, views)(samples)
        return loss


def _drawn(
    sampler: CandidateSampler,
    noise: Tensor,
    draws: Sequence[torch.Generator],
    times: int,
    cond: Cond | None,
    target: Target,
) -> GuidedSamples:
    """So many candidates of each sample, from their noise."""
    given = None
    if cond is not None:
        given = {name: _repeated(row, times) for name, row in cond.items()}
    return sampler(noise, given, repeated(target, times), draws)


def _repeated(rows: Tensor, times: int) -> Tensor:
    return rows.repeat(times, *[1] * (rows.ndim - 1))


def _columns(trace: Trace, rows: slice) -> tuple[Tensor, ...]:
    """What a trace says of some samples, the sample's dimension first."""
    tables = trace.loss, trace.gradient_norm, trace.displacement, trace.alignment, trace.nonfinite
    return (*(table[:, rows].T for table in tables), trace.finished[rows])


def _trace(times: tuple[float, ...], columns: Sequence[Tensor], costs: Costs) -> Trace:
    """The trace whose :func:`_columns` are those."""
    *tables, finished = columns
    loss, norm, moved, alignment, nonfinite = (table.T for table in tables)
    return Trace(times, loss, norm, moved, alignment, nonfinite, finished, costs)

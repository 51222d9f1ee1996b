"""Search for the numbers of a guidance configuration, by what a judge says of small samples.

The greedy beam search of TFG (Ye et al. 2024) and, for baselines, a search along one number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewstep.errors import FewstepError
from fewstep.guidance.energies import Target
from fewstep.guidance.judge import Judge, refuse_guide_as_judge
from fewstep.guidance.knobs import Knob, Searched, configured, read_number
from fewstep.guidance.sampler import GuidedSamples


@dataclass(frozen=True)
class Trial:
    """What the judge said of one configuration.

    Attributes:
        values: its numbers.
        round: of the search, from 0.
        score: the judge's mean, higher is better; None if sampling failed.
        error: the mean's standard error over samples.
        failure: why sampling failed.
        denoiser_evaluations, denoiser_gradients, energy_evaluations: of each sample.
        seconds: of the run.
    """

    values: dict[str, float]
    round: int
    score: float | None
    error: float | None = None
    failure: str | None = None
    denoiser_evaluations: int = 0
    denoiser_gradients: int = 0
    energy_evaluations: int = 0
    seconds: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Trial:
        """Reads back :meth:`to_record`.

        Raises:
            FewstepError: if it is something else.
        """
        try:
            return cls(**record)
        except TypeError as error:
            raise FewstepError(
                f"A record of a search cannot be read ({error}). Give back what to_record wrote, "
                "or start without records."
            ) from error


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in the order they were made.

    The best score is the largest of many and so a little lucky: measure the winner again, at full
    size and from other noise.
    """

    start: Searched
    trials: tuple[Trial, ...]

    @property
    def ranked(self) -> list[Trial]:
        """Trials that succeeded, the best first; of equals, the one that was made first."""
        sound = [trial for trial in self.trials if trial.score is not None]
        return sorted(sound, key=lambda trial: -(trial.score or 0.0))

    @property
    def best(self) -> Trial:
        """The best of them.

        Raises:
            FewstepError: if all trials failed.
        """
        if not self.ranked:
            raise FewstepError(
                f"All {len(self.trials)} trials of the search failed; the first with: "
                f"{self.trials[0].failure}"
            )
        return self.ranked[0]

    @property
    def guidance(self) -> Searched:
        """The best configuration."""
        return configured(self.start, self.best.values)

    def records(self) -> list[dict[str, Any]]:
        """All trials as plain values, from which a search can go on."""
        return [trial.to_record() for trial in self.trials]


@dataclass(frozen=True)
class Bench:
    """What every trial of a search has in common.

    Args:
        sample: draws a small sample with a configuration, from the same noise every time, so that
            two configurations differ in nothing else.
        judge: scores it. It cannot be the guide: see :class:`fewstep.guidance.Judge`.
        target: what is wanted of each sample, which the judge is told.
        on_trial: called after every new trial, to save its record.
    """

    sample: Callable[[Searched], GuidedSamples]
    judge: Judge
    target: Target = None
    on_trial: Callable[[Trial], None] | None = None

    def trial(self, start: Searched, values: dict[str, float], number: int) -> Trial:
        """Samples and judges one configuration, in round ``number``."""
        try:
            run = self.sample(configured(start, values))
        except FewstepError as error:  # such as guidance that diverged
            return Trial(values, number, None, failure=str(error))
        scores = self.judge(run.samples, self.target).detach().double()
        if scores.shape != (len(run.samples),):
            raise FewstepError(
                f"{type(self.judge).__name__} returned scores of shape {tuple(scores.shape)} for "
                f"{len(run.samples)} samples; a judge returns one score for each sample."
            )
        mean = float(scores.mean())
        if not math.isfinite(mean):
            return Trial(values, number, None, failure="The judge's scores are not finite.")
        spread = float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else None
        return Trial(values, number, mean, spread, None, **asdict(run.trace.costs))


class _Table:
    """Trials so far: new configurations are tried, known ones are not."""

    def __init__(
        self, start: Searched, names: list[str], bench: Bench, known: Iterable[dict[str, Any]]
    ) -> None:
        refuse_guide_as_judge(bench.judge, start.energy)
        self.start, self.names, self.bench = start, names, bench
        self.known = {self._key(t.values): t for t in map(Trial.from_record, known)}
        self.trials: dict[tuple[float, ...], Trial] = {}

    def _key(self, values: dict[str, float]) -> tuple[float, ...]:
        if set(values) != set(self.names):
            raise FewstepError(
                f"A record of another search was given: it has {sorted(values)}, this search is "
                f"over {sorted(self.names)}. Start without records, or search over the same."
            )
        # Twelve digits: two paths of multiplications to one value differ in the last ones.
        return tuple(float(f"{values[name]:.12g}") for name in self.names)

    def try_all(self, configurations: Iterable[dict[str, float]], number: int) -> bool:
        """Tries those that are new to this search; whether any was."""
        found = False
        for values in configurations:
            key = self._key(values)
            if key in self.trials:
                continue
            found = True
            if key in self.known:
                self.trials[key] = replace(self.known[key], round=number)
                continue
            self.trials[key] = trial = self.bench.trial(self.start, values, number)
            if self.bench.on_trial is not None:
                self.bench.on_trial(trial)
        return found

    def result(self) -> SearchResult:
        return SearchResult(self.start, tuple(self.trials.values()))


def beam_search(
    start: Searched,
    knobs: Sequence[Knob],
    bench: Bench,
    topk: int = 2,
    rounds: int = 6,
    known: Iterable[dict[str, Any]] = (),
) -> SearchResult:
    """Greedy beam search: the best so far, each with one of its numbers raised, again and again.

    Every round takes the best ``topk`` of all trials so far and tries each of their children that
    was not tried before; a child has one number raised, up to its cap. The search ends after
    ``rounds``, or when no child is new. Defaults are TFG's, with 64 samples a trial.

    Args:
        start: the configuration to start from, below the best; TFG's is ``tfg(energy)``.
        knobs: the numbers searched over; TFG's are :data:`fewstep.guidance.knobs.TFG_KNOBS`.
        bench: how a configuration is tried.
        topk: configurations that have children in a round.
        rounds: of children.
        known: records of an earlier search over the same numbers with the same bench; what they
            hold is not tried again.

    Raises:
        FewstepError: if the judge is the guide, if a number cannot be searched over, or if the
            first trials all failed.
    """
    if topk < 1 or rounds < 1 or not knobs:
        raise FewstepError("A beam search needs a knob, and topk and rounds of 1 or more.")
    values = {knob.field: knob.first(start) for knob in knobs}
    table = _Table(start, list(values), bench, known)
    table.try_all([values], 0)
    for number in range(1, rounds + 1):
        table.result().best  # noqa: B018  (raises if nothing worked so far)
        beam = [trial.values for trial in table.result().ranked[:topk]]
        children = [{**v, k.field: k.raised(start, v[k.field])} for v in beam for k in knobs]
        if not table.try_all(children, number):
            break
    return table.result()


def line_search(
    start: Searched, knob: Knob, bench: Bench, known: Iterable[dict[str, Any]] = ()
) -> SearchResult:
    """One number raised from its start to its cap, every value tried: how baselines are tuned.

    Arguments and errors as for :func:`beam_search`.
    """
    values = [knob.first(start)]
    while values[-1] < knob.cap and (above := knob.raised(start, values[-1])) > values[-1]:
        values.append(above)
    return grid_search(start, {knob.field: values}, bench, known)


def grid_search(
    start: Searched,
    grid: dict[str, Sequence[float]],
    bench: Bench,
    known: Iterable[dict[str, Any]] = (),
) -> SearchResult:
    """Every combination of the values given for each number.

    Arguments and errors as for :func:`beam_search`.
    """
    for field in grid:
        read_number(start, field)
    table = _Table(start, list(grid), bench, known)
    combinations = itertools.product(*grid.values())
    table.try_all((dict(zip(grid, values, strict=True)) for values in combinations), 0)
    return table.result()

"""The evaluation's matrix: weights x step counts x seeds, each cell measured by every metric."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from callbacks.generation import Cell, Scene
from callbacks.preemption import leave_if_requested
from callbacks.reference_sets import Against, ReferenceSets
from callbacks.results import Measurement
from callbacks.together import on_first_rank
from fewstep.contracts import SteeredSampler
from fewstep.metrics import Metric, Samples, Statistics


class Matrix:
    """Measures cells, one after the other; every method that measures is a collective.

    Args:
        scene: who samples, and the data.
        references: what samples are compared with; its metrics are the ones measured.
        against: which of the reference sets.
        num_samples: samples a cell.
    """

    def __init__(
        self,
        scene: Scene,
        references: ReferenceSets,
        against: Sequence[Against],
        num_samples: int,
    ) -> None:
        self.scene = scene
        self.references = references
        self.metrics = references.metrics
        self.against = against
        self.num_samples = num_samples

    def measure(self, cells: Sequence[Cell]) -> list[Measurement]:
        """All values of all cells.

        Raises:
            FewstepError: on all ranks, if samples are too few for a metric.
            Preempted: if the run is asked to stop while its trained student is measured.
        """
        found: list[Measurement] = []
        paired = [n for n, metric in enumerate(self.metrics) if metric.reference == "pairs"]
        pairs: dict[Cell, list[Statistics]] = {}
        with self._bar(len(cells)) as bar:
            for cell in cells:
                leave_if_requested(self.scene.trainer)
                bar.set_postfix_str(f"{cell.role}, {cell.num_steps} steps")
                samples = _counted(self.scene.generated(cell, self.num_samples), bar)
                statistics = self.scene.collected(self.metrics, samples, cell.described())
                pairs[cell] = [statistics[n] for n in paired]
                found += self._compared_with_sets(cell, statistics)
        if paired:
            found += self._compared_in_pairs([self.metrics[n] for n in paired], pairs)
        return found

    def _compared_with_sets(
        self, cell: Cell, statistics: Sequence[Statistics]
    ) -> list[Measurement]:
        found: list[Measurement] = []
        for against in self.against:
            about = {"reference": self.references.describe(self.scene, against)}
            references = self.references.statistics(self.scene, against)
            for metric, own, reference in zip(self.metrics, statistics, references, strict=True):
                first = against == self.against[0]
                if metric.reference == "data":
                    suffix = "_to_teacher" if against == "teacher" else ""
                    values = self._values(metric, own, reference, cell, suffix, about)
                    found += [m for m in values if first or m.metric not in metric.own_values]
                elif metric.reference == "none" and first:
                    found += self._values(metric, own, None, cell, "", {})
        return found

    def _compared_in_pairs(
        self, metrics: Sequence[Metric], pairs: dict[Cell, list[Statistics]]
    ) -> list[Measurement]:
        """Compares samples of the same noise: with the most steps, and with the teacher."""
        found: list[Measurement] = []
        known = dict(pairs)
        for cell, statistics in pairs.items():
            for suffix, other in self._partners(cell, list(pairs)).items():
                if other not in known:
                    most = max(metric.pairs for metric in metrics)
                    samples = self.scene.generated(other, min(most, self.num_samples))
                    known[other] = self.scene.collected(metrics, samples, other.described())
                about = {"pairs": {"role": other.role, "num_steps": other.num_steps}}
                for metric, own, theirs in zip(metrics, statistics, known[other], strict=True):
                    found += self._values(metric, own, theirs, cell, suffix, about)
        return found

    def _partners(self, cell: Cell, cells: Sequence[Cell]) -> dict[str, Cell]:
        """Which cells a cell's samples are compared with, by what the values are called."""
        most = max(c.num_steps for c in cells if (c.role, c.seed) == (cell.role, cell.seed))
        partners = {f"_to_{most}_steps": Cell(cell.role, most, cell.seed)}
        if "teacher" in self.scene.sampler.sampling_roles():
            steps = self.references.teacher_steps
            partners["_to_teacher"] = self.scene.reference_cell("teacher", steps, cell.seed)
        return {suffix: other for suffix, other in partners.items() if other != cell}

    def _values(
        self,
        metric: Metric,
        own: Statistics,
        reference: Statistics | None,
        cell: Cell,
        suffix: str,
        about: dict[str, Any],
    ) -> list[Measurement]:
        """One metric's values, computed by the first rank.

        Those that the reference has no part in are not called by it.
        """
        sampler = self.scene.sampler
        protocol = {
            **metric.protocol(),
            "sample_shape": list(sampler.sample_shape),
            "precision": str(self.scene.trainer.precision),
        }
        cost: dict[str, float] = {}
        if isinstance(self.scene.module, SteeredSampler):
            cost = self.scene.module.sampling_cost(cell.num_steps, cell.role)
        values = on_first_rank(self.scene.trainer, lambda: metric.compute(own, reference))
        in_pairs = metric.reference == "pairs"
        return [
            Measurement(
                metric=name if name in metric.own_values else f"{name}{suffix}",
                value=value,
                num_steps=cell.num_steps,
                network_evaluations=sampler.sampling_evaluations(cell.num_steps, cell.role),
                guidance_scale=sampler.guidance_scale(cell.role),
                role=cell.role,
                num_samples=min(metric.pairs, self.num_samples) if in_pairs else self.num_samples,
                seed=cell.seed,
                protocol=protocol if name in metric.own_values else {**protocol, **about},
                better=metric.better[name],
                cost=cost or None,
            )
            for name, value in values.items()
        ]

    def _bar(self, cells: int) -> tqdm[Any]:
        shown = self.scene.trainer.is_global_zero and sys.stderr.isatty()
        total = cells * self.scene.num_batches(self.num_samples)
        return tqdm(total=total, desc="measuring", unit="batch", leave=False, disable=not shown)


def _counted(samples: Iterable[Samples], bar: tqdm[Any]) -> Iterator[Samples]:
    for batch in samples:
        yield batch
        bar.update()

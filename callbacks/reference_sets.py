"""What generated samples are compared with: the data set, or samples of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from callbacks.generation import Scene
from callbacks.preemption import leave_if_requested
from callbacks.together import on_first_rank
from fewstep.errors import FewstepError
from fewstep.metrics import Metric, ReferenceStore, Samples, Statistics

Against = Literal["data", "teacher"]

# Noise of the teacher's reference samples, unlike that of any measurement.
TEACHER_SEED = 2**31 - 1


class ReferenceSets:
    """Reference statistics for a list of metrics, each computed once.

    Those of a data set are stored on disk, where other runs and later evaluations find them.

    Args:
        metrics: whose statistics.
        store: where those of data sets are kept.
        teacher_steps: sampling steps of the teacher.
        teacher_samples: how many it makes.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        store: ReferenceStore,
        teacher_steps: int,
        teacher_samples: int,
    ) -> None:
        self.metrics = metrics
        self.store = store
        self.teacher_steps = teacher_steps
        self.teacher_samples = teacher_samples
        self._found: dict[Against, list[Statistics | None]] = {}

    def statistics(self, scene: Scene, against: Against) -> list[Statistics | None]:
        """One entry a metric, complete on the first rank; None where it compares with nothing.

        A collective.
        """
        if against not in self._found:
            self._found[against] = self._find(scene, against)
        return self._found[against]

    def _find(self, scene: Scene, against: Against) -> list[Statistics | None]:
        about = self.describe(scene, against)
        compared = [metric.reference == "data" for metric in self.metrics]
        found: list[Statistics | None] = [None] * len(compared)
        first = scene.trainer.is_global_zero

        def stored() -> list[bool]:
            if against == "data":
                found[:] = [
                    self.store.load(metric, about) if is_compared else None
                    for metric, is_compared in zip(self.metrics, compared, strict=True)
                ]
            return [one is not None for one in found]

        there = on_first_rank(scene.trainer, stored)
        missing = [n for n, is_there in enumerate(there) if compared[n] and not is_there]
        if not missing:
            return found
        leave_if_requested(scene.trainer)
        chosen = [self.metrics[n] for n in missing]
        fresh = scene.collected(chosen, *self._samples(scene, against))
        for number, new in zip(missing, fresh, strict=True):
            found[number] = new
            if against == "data" and first:
                self.store.save(self.metrics[number], about, new)
        leave_if_requested(scene.trainer)
        return found

    def _samples(self, scene: Scene, against: Against) -> tuple[Iterator[Samples], str]:
        """This rank's share of the reference set, and what it is called in messages."""
        if against == "data":
            return scene.recorded(), "records of the reference set"
        check_against(scene, against)
        cell = scene.reference_cell("teacher", self.teacher_steps, TEACHER_SEED)
        return scene.generated(cell, self.teacher_samples), cell.described()

    def describe(self, scene: Scene, against: Against) -> dict[str, Any]:
        """Which set it is, in plain values; a collective."""
        data = on_first_rank(scene.trainer, scene.data.reference_protocol)
        if against == "data":
            return data
        return {
            "samples_of": "teacher",
            "teacher": getattr(scene.module, "provenance", {}).get("teacher"),
            "num_steps": self.teacher_steps,
            "num_samples": self.teacher_samples,
            "conditions_of": data,
        }


def check_against(scene: Scene, against: Against) -> None:
    """Makes sure that there is what samples are to be compared with.

    Raises:
        FewstepError: if it is the teacher and the method has none, or data without a reference.
    """
    if against == "data":
        _ = scene.data
    elif "teacher" not in scene.sampler.sampling_roles():
        raise FewstepError(
            f"{type(scene.module).__name__} has no teacher to compare with: take 'teacher' out "
            "of the Evaluation callback's `against`."
        )

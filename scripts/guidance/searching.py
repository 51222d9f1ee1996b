"""A search of guidance's numbers within a run that is set up as an evaluation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.generation import Scene
from fewstep.guidance import Bench, Judge, Knob, SearchResult, beam_search, line_search
from fewstep.guidance.described import described
from fewstep.guidance.knobs import Searched, configured
from lightning_modules.steering import Steering
from scripts.guidance.overlay import Overlay
from scripts.guidance.records import Records
from scripts.guidance.table import notes, table
from scripts.guidance.trials import Enough, Trials, Tuning

BATCH_SIZE = 256  # the noise of a sample does not depend on it


@dataclass(frozen=True)
class Search:
    """What is searched over, and how.

    Attributes:
        steering: the experiment's, its guidance with the numbers that the search begins at.
        knobs: the numbers; one is searched along a line, several by a beam.
        overlay: where the configuration has them.
        tuner: scores samples.
        steps: numbers of sampling steps, over which scores are means.
        trials: settings to try.
        samples: of each at each number of steps.
        max_distance: see :class:`Tuning`.
        seed: of the noise.
        folder: where records and the winner are kept.
    """

    steering: Steering
    knobs: Sequence[Knob]
    overlay: Overlay
    tuner: Judge
    steps: list[int]
    trials: int
    samples: int
    max_distance: float | None
    seed: int
    folder: Path

    @property
    def guidance(self) -> Searched:
        """Where the search begins."""
        assert self.steering.guidance is not None
        return self.steering.guidance

    def about(self, module: pl.LightningModule) -> dict[str, Any]:
        """What all trials have in common, in plain values: those of another search differ in it."""
        searched = {knob.field: 1.0 for knob in self.knobs}
        about: dict[str, Any] = {
            "score": f"mean of {type(self.tuner).__name__} over samples and numbers of steps",
            "bound": "none",
            "tuner": described(self.tuner),
            "network": getattr(module, "provenance", {}),
            "steering": described(self.steering) | {"guidance": None},
            "guidance": described(configured(self.guidance, searched)),
            "knobs": [knob.field for knob in self.knobs],
            "steps": self.steps,
            "samples": self.samples,
            "seed": self.seed,
        }
        if self.max_distance is not None:
            about["bound"] = (
                f"at every number of steps nearest_data_ratio at most {self.max_distance:g} times "
                "that of unguided samples"
            )
        return about

    def run(self, scene: Scene) -> SearchResult:
        """Tries settings, those first that an earlier call has tried, and writes down the best.

        Raises:
            FewstepError: if the records are of another search, or no setting works.
        """
        records = Records.opened(self.folder / "trials.jsonl", self.about(scene.module))
        tuning = Tuning(scene, self.steering, self.tuner, self.steps, self.samples, self.seed)
        # A line has as many values as there are to be trials, whatever an earlier call has tried.
        most = self.trials if len(self.knobs) > 1 else self.trials + len(records.trials)
        with Trials(tuning, records, self.max_distance, most).bench() as bench:
            found = self._search(bench, records)
        print(table(found, records))
        self._write(found, records, getattr(scene.trainer, "run_name", "run"))
        return found

    def _search(self, bench: Bench, records: Records) -> SearchResult:
        known = [trial.to_record() for trial in records.trials]
        try:
            if len(self.knobs) == 1:
                return line_search(self.guidance, self.knobs[0], bench, known)
            return beam_search(self.guidance, self.knobs, bench, rounds=self.trials, known=known)
        except Enough:
            return SearchResult(self.guidance, tuple(records.trials))

    def _write(self, found: SearchResult, records: Records, name: str) -> None:
        """Writes the winner as an overlay, under what is to be known of it."""
        best, comment = self.folder / "best.yaml", notes(found, records, name)
        values = {field: float(f"{value:.12g}") for field, value in found.best.values.items()}
        self.overlay.write(best, values, f"{name}+tuned", comment)
        print("\n".join(["", *comment, f"Use it: -c {name} -c {best}", f"Trials: {records.path}"]))


class SearchCallback(Callback):
    """Searches where an evaluation would measure.

    Attributes:
        found: what came of it.
    """

    found: SearchResult | None = None

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs the search."""
        self.found = self.search.run(Scene(trainer, pl_module, BATCH_SIZE))

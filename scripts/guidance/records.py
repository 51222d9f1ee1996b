"""The records of a search: one JSON line for what it is, and one for each trial."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.guidance import Trial


@dataclass(frozen=True)
class Look:
    """What the tuner says of samples at one number of steps.

    Attributes:
        score: its mean.
        distance: of samples from data, where 1 is that of unseen data; None if not measured.
    """

    num_steps: int
    score: float
    distance: float | None = None


@dataclass
class Records:
    """A file that every trial is added to as it is made.

    Attributes:
        about: what all trials have in common; those of another search are refused.
        trials: that are known, by their numbers.
        looks: at each of them, in the same order.
        unguided: looks at samples without guidance.
    """

    path: Path
    about: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    looks: list[list[Look]] = field(default_factory=list)
    unguided: list[Look] | None = None

    @classmethod
    def opened(cls, path: Path, about: dict[str, Any]) -> Records:
        """Reads what there is, or begins a new file.

        Raises:
            FewstepError: if it is of another search.
        """
        about = json.loads(json.dumps(about))  # as it will be read
        records = cls(path, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line that was being written when the process was killed has no end, and no worth.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if not lines:
            records._add({"search": about})
        for line in lines:
            records._take(json.loads(line))
        return records

    def add(self, trial: Trial, looks: list[Look]) -> None:
        """Adds a trial."""
        self.trials.append(trial)
        self.looks.append(looks)
        self._add({"trial": trial.to_record(), "steps": [asdict(look) for look in looks]})

    def add_unguided(self, looks: list[Look]) -> None:
        """Adds samples without guidance."""
        self.unguided = looks
        self._add({"unguided": [asdict(look) for look in looks]})

    def looks_at(self, trial: Trial) -> list[Look]:
        """The looks at a trial."""
        for known, looks in zip(self.trials, self.looks, strict=True):
            if known.values == trial.values:
                return looks
        return []

    def _take(self, record: dict[str, Any]) -> None:
        if "search" in record:
            self._compare(record["search"])
        elif "unguided" in record:
            self.unguided = [Look(**look) for look in record["unguided"]]
        else:
            self.trials.append(Trial.from_record(record["trial"]))
            self.looks.append([Look(**look) for look in record["steps"]])

    def _compare(self, before: dict[str, Any]) -> None:
        other = [name for name in self.about if before.get(name) != self.about[name]]
        if other:
            raise FewstepError(
                f"'{self.path}' is of another search: {', '.join(other)} was different. Give this "
                "one a folder of its own with --name, or remove that file."
            )

    def _add(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

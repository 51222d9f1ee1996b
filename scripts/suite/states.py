"""What became of a run, as its folder and SLURM tell it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from callbacks.finite import EXIT_STATUS as NOT_FINITE
from callbacks.preemption import EXIT_STATUS
from callbacks.results import FILE_NAME, read_results
from fewstep.errors import FewstepError
from fewstep.networks.loading import newest_checkpoint
from fewstep.spec import default_at
from scripts.report.data import CONFIG_FILE, flatten

LOCAL = "local"
CLUSTER = "slurm"
# Where and how it runs; a run is the same run there.
PLACE = ("run.", "ckpt_path")
MACHINE = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")
# What is measured when training is over: another answer needs no other training.
MEASURING = re.compile(
    r"model\.init_args\.step_counts|trainer\.callbacks\[(Evaluation|Samples)[^\]]*\]\..*"
)
UPDATE = re.compile(r"update_(\d+)")
DIVERGED = "diverged"


class State(StrEnum):
    """A run's state; its value is what the plan shows."""

    DONE = "done"
    MEASURE = "to measure"
    PARTLY = "partly"
    FAILED = "failed"
    TODO = "to do"
    QUEUED = "in the queue"
    CHANGED = "changed"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Standing:
    """A run's state, and a word on it."""

    state: State
    detail: str = ""


@dataclass(frozen=True)
class Asked:
    """What a run is asked to be.

    Attributes:
        config: the resolved configuration.
        parents: keys whose value is another run of the suite, to that run's folder below it.
        chosen: keys that the suite itself sets; those count even if they only say where to run.
    """

    config: dict[str, Any]
    parents: Mapping[str, Path]
    chosen: frozenset[str]

    @property
    def max_steps(self) -> int:
        """Student updates of the whole run."""
        return int(self.config["trainer"]["max_steps"])

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys in which a run's recorded configuration is another: what it was, and is to be."""
        was, now = flatten(dict(recorded)), flatten(self.config)
        found = {}
        for key in sorted(was.keys() | now.keys()):
            elsewhere = key.startswith(PLACE) or (key in MACHINE and key not in self.chosen)
            pair = was.get(key), now.get(key)
            same = pair[0] == pair[1] or self._same_parent(key, pair[0])
            if not elsewhere and not same and not (key not in was and _is_default(key, now)):
                found[key] = pair
        return found

    def _same_parent(self, key: str, value: Any) -> bool:
        """Whether a path names the right run, wherever the suite's folder lay at the time."""
        parent = self.parents.get(key)
        if parent is None or not isinstance(value, str):
            return False
        return Path(value).parts[-len(parent.parts) :] == parent.parts


def _is_default(key: str, config: Mapping[str, Any]) -> bool:
    """Whether an option is at its class's default: as before the class had it."""
    owner, _, names = key.rpartition(".init_args.")
    default = default_at(str(config.get(f"{owner}.class_path")), names.split("."))
    return bool(default == config[key])


def recorded_config(run: Path) -> dict[str, Any] | None:
    """The configuration a run was last trained with; None if it never got so far."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise FewstepError(f"'{path}' cannot be read ({error}). Delete '{run}'.") from error


def standing_of(run: Path, asked: Asked, queue: Mapping[str, str]) -> Standing:
    """The state of a run.

    Args:
        queue: SLURM's jobs that wait or run, by id.

    Raises:
        FewstepError: for a damaged file in its folder.
    """
    job = job_of(run)
    if job is not None and job in queue:
        return Standing(State.QUEUED, f"job {job} {queue[job].lower()}")
    recorded = recorded_config(run)
    differences = {} if recorded is None else asked.differences(recorded)
    training = {k: v for k, v in differences.items() if not MEASURING.fullmatch(k)}
    if training:
        return Standing(State.CHANGED, told(training))
    update = newest_update(run)
    if recorded is not None and update >= asked.max_steps:
        if differences:
            return Standing(State.MEASURE, told(differences))
        return Standing(State.DONE) if measured(run, asked) else Standing(State.MEASURE, "trained")
    reached = f"at update {update} of {asked.max_steps}" if update else ""
    status = exit_status(run)
    if status not in (None, 0, EXIT_STATUS):
        return Standing(State.FAILED, ", ".join(filter(None, [reason(status), reached])))
    return Standing(State.PARTLY, reached) if update else Standing(State.TODO)


def reason(status: int | None) -> str:
    """Why a run failed, by its exit status."""
    return DIVERGED if status == NOT_FINITE else f"status {status}"


def measured(run: Path, asked: Asked) -> bool:
    """Whether the trained student has been measured."""
    path = run / FILE_NAME
    if not path.is_file():
        return False
    results = read_results(path)
    return results.get("student_updates") == asked.max_steps and bool(results["measurements"])


def newest_update(run: Path) -> int:
    """The update of the newest checkpoint; 0 if there is none."""
    checkpoint = newest_checkpoint(run)
    found = UPDATE.search(checkpoint.resolve().name) if checkpoint else None
    return int(found[1]) if found else 0


def exit_status(run: Path) -> int | None:
    """What the last start of a run left with; None if it has not ended or was cut short."""
    files = [run / where / "exit" for where in (LOCAL, CLUSTER)]
    files = sorted((f for f in files if f.is_file()), key=lambda file: file.stat().st_mtime)
    text = files[-1].read_text().strip() if files else ""
    return int(text) if text.lstrip("-").isdigit() else None


def job_of(run: Path) -> str | None:
    """The SLURM job that was last given a run."""
    path = run / CLUSTER / "job.json"
    return str(json.loads(path.read_text())["job"]) if path.is_file() else None


def told(differences: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    """Differences in one line."""
    parts: Iterable[str] = (f"{key} {was} → {now}" for key, (was, now) in differences.items())
    shown = list(parts)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return "; ".join(shown[:most]) + more

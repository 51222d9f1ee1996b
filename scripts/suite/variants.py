"""The runs a suite asks for, before anyone looks at what is on disk."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fewstep.errors import FewstepError, nearest
from scripts.callback_options import CALLBACKS, class_name, with_callbacks
from scripts.report.data import CONFIG_FILE
from scripts.slurm.submit import CheckedExperiment
from scripts.suite.files import Entry, Suite, keys_of


@dataclass(eq=False)
class Variant:
    """An entry at one point of its grid; it is trained once a seed.

    Attributes:
        label: the entry's, with the point where there is a grid.
        point: what the grid sets here.
        parents: configuration key to the variant whose trained run it is given.
        config: the resolved configuration, every key of it checked; of the first seed.
    """

    label: str
    entry: Entry
    point: dict[str, Any]
    parents: dict[str, Variant] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """All that is set, the grid's last."""
        return {**self.entry.overrides, **self.point}

    def seed_of_parent(self, parent: Variant, seed: int) -> int:
        """Which run of a parent goes with a seed: the same seed's, or its only one."""
        return seed if seed in parent.entry.seeds else parent.entry.seeds[0]


def variants_of(suite: Suite) -> list[Variant]:
    """All variants, each after those it needs.

    Raises:
        FewstepError: for a parent that is not there, not a single one, or needs its own child.
    """
    found = [variant for entry in suite.entries for variant in points_of(entry)]
    labels = [variant.label for variant in found]
    for label in labels:
        if labels.count(label) > 1:
            raise FewstepError(f"'{suite.path}' has two runs '{label}'; change a `label`.")
    for variant in found:
        for key, label in variant.entry.after.items():
            variant.parents[key] = parent_of(variant, label, found)
    return parents_first(found)


def points_of(entry: Entry) -> list[Variant]:
    """An entry's variants: the cartesian product of its grid."""
    made = []
    for values in itertools.product(*entry.grid.values()):
        point: dict[str, Any] = {}
        for together, value in zip(entry.grid, values, strict=True):
            keys = keys_of(together)
            point |= zip(keys, value, strict=True) if len(keys) > 1 else {keys[0]: value}
        made.append(Variant(label_at(entry, point), entry, point))
    return made


def label_at(entry: Entry, point: Mapping[str, Any], without: str | None = None) -> str:
    """An entry's label at a point of its grid; of keys that are set together the first is named.

    Args:
        without: a key to leave out.
    """
    named = leading_keys(entry)
    parts = [f"{short_key(key, named)}={shown(point[key])}" for key in named if key != without]
    return ",".join([entry.label, *parts])


def leading_keys(entry: Entry) -> list[str]:
    """What an entry's grid goes through: of keys that are set together, the first."""
    return [keys_of(together)[0] for together in entry.grid]


def short_key(key: str, among: Iterable[str]) -> str:
    """The end of a dotted key, as long as it must be to differ from the others'."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in among) == 1:
            return end
    return key


def shown(value: Any) -> str:
    """A value as part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return re.sub(r"[^\w.+,-]+", "_", text).strip("_")


def parent_of(variant: Variant, label: str, among: list[Variant]) -> Variant:
    """The variant a label means: where both have a grid, the one at the same point.

    Raises:
        FewstepError: if there is none or more than one, or its seeds do not fit.
    """
    named = [v for v in among if label in (v.label, v.entry.label) and v.entry is not variant.entry]
    if not named:
        known = [v.label for v in among if v.entry is not variant.entry]
        raise FewstepError(
            f"'{variant.label}' comes after '{label}', which the suite does not have."
            f"{nearest(label, known)} Known: {', '.join(known)}."
        )
    shared = [v for v in named if all(variant.point.get(k, x) == x for k, x in v.point.items())]
    if len(shared) != 1:
        raise FewstepError(
            f"'{variant.label}' comes after '{label}', which is {len(shared)} runs a seed: "
            f"{', '.join(v.label for v in shared or named)}. Name one of them."
        )
    parent = shared[0]
    without = [s for s in variant.entry.seeds if s not in parent.entry.seeds]
    if without and len(parent.entry.seeds) > 1:
        raise FewstepError(
            f"'{variant.label}' has seed {without[0]}, but '{parent.label}', which it needs, has "
            f"only {', '.join(map(str, parent.entry.seeds))}. Give it the same seeds, or one."
        )
    return parent


def parents_first(found: list[Variant]) -> list[Variant]:
    """The same variants, each behind its parents, else in the suite's order.

    Raises:
        FewstepError: if some need one another.
    """
    ordered: list[Variant] = []
    waiting = list(found)
    while waiting:
        ready = [v for v in waiting if all(p in ordered for p in v.parents.values())]
        if not ready:
            raise FewstepError(
                f"These entries come `after` one another: {', '.join(v.label for v in waiting)}."
            )
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


# ---------------------------------------------------------------------- checking


def check(variant: Variant, home: Path) -> None:
    """Resolves a variant's configuration as ``fewstep fit`` would; builds and touches nothing.

    Raises:
        FewstepError: naming the entry, for an experiment or key that is not there.
    """
    try:
        variant.config = resolve(variant, home)
    except FewstepError as error:
        raise FewstepError(f"Entry '{variant.label}': {error}") from error


def resolve(variant: Variant, home: Path) -> dict[str, Any]:
    """The resolved configuration of a variant's first seed.

    Raises:
        FewstepError: for what is wrong in it.
    """
    entry = variant.entry
    in_callbacks = {k: v for k, v in variant.overrides.items() if k.startswith(f"{CALLBACKS}.")}
    settings = {k: v for k, v in variant.overrides.items() if k not in in_callbacks}
    settings |= {key: str(home / parent.label) for key, parent in variant.parents.items()}
    settings |= {"seed_everything": entry.seeds[0], "run.dir": str(home), "run.name": variant.label}
    config = parse(entry.experiment, settings)
    if in_callbacks:
        settings[CALLBACKS] = with_callbacks(config["trainer"]["callbacks"], in_callbacks)
        config = parse(entry.experiment, settings)
    if steps := measured_steps(variant, config):
        # Known to be good: no parsing, on which a plan spends nearly all of its time.
        config["model"]["init_args"]["step_counts"] = steps
    names = [class_name(callback) for callback in config["trainer"]["callbacks"] or []]
    if "Evaluation" not in names:
        raise FewstepError(
            f"'{entry.experiment}' has no callbacks.Evaluation, so there would be nothing to "
            "compare; add it to its trainer.callbacks."
        )
    if config["trainer"]["max_steps"] is None or config["trainer"]["max_steps"] < 0:
        raise FewstepError(f"'{entry.experiment}' has no trainer.max_steps, so it would never end.")
    return config


def parse(experiment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment with overrides as plain values, all defaults included.

    The overrides go through a file, since the parser's complaints about those are better.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        file.write_text(yaml.safe_dump(nested(settings)), encoding="utf-8")
        return CheckedExperiment(["fit", "-c", experiment, "-c", str(file)]).plain()


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings of mappings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *folders, last = key.split(".")
        target = found
        for folder in folders:
            target = target.setdefault(folder, {})
            if not isinstance(target, dict):
                raise FewstepError(f"'{key}' is set, and so is a whole that it is a part of.")
        target[last] = value
    return found


def measured_steps(variant: Variant, config: Mapping[str, Any]) -> list[int] | None:
    """The step counts to measure at, if the suite says so and the method serves them.

    A method that serves one number of steps keeps it where the suite asks all methods for several;
    so does a student of one phase, which serves more where its own entry asks for them.

    Raises:
        FewstepError: if the entry itself asks for steps that its method does not serve.
    """
    entry, options = variant.entry, config["model"]["init_args"]
    if not entry.steps:
        return None
    phases, points = options.get("num_phases"), options.get("num_grid_points")
    renoised = phases == 1 and entry.own_steps
    if phases and not renoised and not options.get("allow_untrained_steps"):
        served = [steps for steps in entry.steps if steps == phases]
        serves = f"{phases}, as many as it has phases"
    else:
        most = (None if renoised else phases) or points or max(entry.steps)
        served = [steps for steps in entry.steps if steps <= most]
        serves = f"1 to {most}"
    if entry.own_steps and len(served) < len(entry.steps):
        raise FewstepError(f"steps {list(entry.steps)}: this student serves {serves}.")
    return served or None

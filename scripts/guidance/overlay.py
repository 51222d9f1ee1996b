"""A search's winning numbers as a small YAML file that goes behind the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import FewstepError
from fewstep.guidance import augmented_polyak, dps, freedom, lgd_mc, mpgd, tfg, universal

COUNTS = {"clean_iterations": "iterations", "recurrence.count": "repeats"}
STATE = {"state.strength": "strength"}
ARGUMENTS: dict[str, dict[str, str]] = {
    dps.__name__: STATE,
    lgd_mc.__name__: {**STATE, "smoothing.copies": "copies"},
    freedom.__name__: {**STATE, "recurrence.count": "recurrence.count"},
    mpgd.__name__: {"clean.strength": "strength", "recurrence.count": "recurrence.count"},
    universal.__name__: {"state.strength": "forward", "clean.strength": "backward", **COUNTS},
    tfg.__name__: {
        "state.strength": "rho",
        "clean.strength": "mu",
        "smoothing.scale": "sigma",
        "smoothing.copies": "copies",
        **COUNTS,
    },
    augmented_polyak.__name__: {
        **STATE,
        "state.rule.strength": "strength",
        "state.radius": "cap",
        "augmentor.copies": "augmentor.copies",
        "recurrence.count": "recurrence.count",
    },
}
"""What functions that make a guidance call its fields."""


@dataclass(frozen=True)
class Overlay:
    """Where an experiment's configuration has the numbers that are searched over.

    Attributes:
        model: the model's part of it.
        places: for each field, the names that lead to it from the guidance.
    """

    model: Mapping[str, Any]
    places: Mapping[str, list[str]]

    @classmethod
    def of(cls, model: Mapping[str, Any], fields: Sequence[str]) -> Overlay:
        """Finds the fields in a configuration.

        Raises:
            FewstepError: if one cannot be set from there.
        """
        return cls(model, {field: _place(_guidance(model), field) for field in fields})

    def content(self, values: Mapping[str, float], run_name: str) -> dict[str, Any]:
        """The configuration to put behind the experiment's own.

        Args:
            values: by field.
            run_name: of runs with them, which are not the experiment's own.
        """
        guidance: dict[str, Any] = {}
        for field, value in values.items():
            _set(guidance, _guidance(self.model), self.places[field], value)
        steering = {"steering": {"guidance": guidance}}
        model = {"class_path": self.model["class_path"], "init_args": steering}
        return {"run": {"name": run_name}, "model": model}

    def write(
        self, path: Path, values: Mapping[str, float], run_name: str, comment: Sequence[str]
    ) -> None:
        """Writes it, under a comment."""
        lines = [f"# {line}".rstrip() for line in comment]
        text = yaml.safe_dump(self.content(values, run_name), sort_keys=False)
        path.write_text("\n".join([*lines, text]), encoding="utf-8")


def _guidance(model: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model["init_args"]["steering"]["guidance"]
    return found


def _place(guidance: Mapping[str, Any], field: str) -> list[str]:
    """The names that lead to a field of the guidance; a class's arguments are in ``init_args``."""
    kind = guidance["class_path"].rpartition(".")[2]
    renamed = ARGUMENTS.get(kind, {}).get(field, field) if kind != "Guidance" else field
    place: list[str] = []
    here: Any = guidance
    for name in renamed.split("."):
        if isinstance(here, Mapping) and "init_args" in here:
            place.append("init_args")
            here = here["init_args"]
        if not isinstance(here, Mapping) or name not in here:
            raise FewstepError(
                f"'{field}' cannot be set in the arguments of {guidance['class_path']}, so a "
                "winner could not be written down. Search over another number, or state the "
                "guidance as a fewstep.guidance.Guidance."
            )
        place.append(name)
        here = here[name]
    return place


def _set(to: dict[str, Any], like: Any, place: Sequence[str], value: float) -> None:
    """Puts a value at a place; classes on the way are named again, so that options are merged."""
    if isinstance(like, Mapping) and "class_path" in like:
        to["class_path"] = like["class_path"]
    first, *rest = place
    if not rest:
        to[first] = value
        return
    _set(to.setdefault(first, {}), like[first], rest, value)

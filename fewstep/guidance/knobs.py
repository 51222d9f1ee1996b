"""The numbers of a guidance configuration, or of optimised noise, by name: what a search turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from fewstep.errors import FewstepError, nearest
from fewstep.guidance.guidance import Guidance
from fewstep.guidance.noise import NoiseOptimisation

Searched = Guidance | NoiseOptimisation


def _number(guidance: Searched, field: str) -> tuple[float, bool]:
    """A number of a configuration, and whether it counts something."""
    thing: Any = guidance
    whole = False
    for name in field.split("."):
        known = {f.name: f.type for f in fields(thing)} if is_dataclass(thing) else {}
        if name not in known:
            raise FewstepError(
                f"The guidance has no number '{field}': {type(thing).__name__} has no '{name}'."
                + nearest(name, known)
            )
        # By how it is declared: a strength may well be written as 1.
        thing, whole = getattr(thing, name), known[name] in ("int", int)
    if isinstance(thing, bool) or not isinstance(thing, (int, float)):
        raise FewstepError(
            f"'{field}' of the guidance is a {type(thing).__name__}; only numbers are searched "
            "over, and they have to be set to start from."
        )
    return thing, whole


def read_number(guidance: Searched, field: str) -> float:
    """A number of a configuration.

    Args:
        field: where it is, such as ``state.rule.strength``.

    Raises:
        FewstepError: if there is no such number.
    """
    return _number(guidance, field)[0]


def with_number(guidance: Searched, field: str, value: float) -> Searched:
    """The same configuration with another number; what counts something is rounded.

    Raises:
        FewstepError: if there is no such number.
    """
    new = round(value) if _number(guidance, field)[1] else float(value)

    def changed(thing: Any, path: Sequence[str]) -> Any:
        if not path:
            return new
        return replace(thing, **{path[0]: changed(getattr(thing, path[0]), path[1:])})

    result: Searched = changed(guidance, field.split("."))
    return result


def configured(guidance: Searched, values: dict[str, float]) -> Searched:
    """The same configuration with other numbers."""
    for field, value in values.items():
        guidance = with_number(guidance, field, value)
    return guidance


@dataclass(frozen=True)
class Knob:
    """A number of a guidance configuration that is searched over.

    Args:
        field: where it is, such as ``state.strength``, ``state.rule.strength`` (within Capped),
            ``clean.strength``, ``smoothing.scale`` or ``recurrence.count``.
        cap: its largest value.
        factor: a step of the search multiplies by this; what counts something grows by 1 at
            least. Only larger values are tried, so start below the best.
    """

    field: str
    cap: float
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise FewstepError(
                f"The search multiplies '{self.field}' by a factor above 1, not {self.factor:g}."
            )

    def first(self, guidance: Searched) -> float:
        """Where the search starts.

        Raises:
            FewstepError: if multiplication leads nowhere from there.
        """
        value = read_number(guidance, self.field)
        if not 0 < value <= self.cap:
            raise FewstepError(
                f"'{self.field}' starts at {value:g} and is multiplied up to {self.cap:g}; start "
                "above 0 and not above the cap."
            )
        return value

    def raised(self, guidance: Searched, value: float) -> float:
        """The next value, no larger than the cap."""
        if _number(guidance, self.field)[1]:
            return min(max(int(value * self.factor), int(value) + 1), int(self.cap))
        return min(value * self.factor, self.cap)


TFG_KNOBS = (
    Knob("state.strength", 8.0),
    Knob("clean.strength", 8.0),
    Knob("smoothing.scale", 1.0, 10.0),
)
"""What TFG's search turns: rho, mu and sigma of :func:`fewstep.guidance.tfg`."""

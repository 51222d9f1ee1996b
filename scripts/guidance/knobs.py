"""Which numbers of a guidance are searched over, and from where to where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from fewstep.errors import FewstepError
from fewstep.guidance import Guidance, Knob
from fewstep.guidance.knobs import TFG_KNOBS, Searched, configured, read_number, with_number

FACTORS = {knob.field: knob.factor for knob in TFG_KNOBS}


def strengths(guidance: Searched) -> list[str]:
    """The fields called strength of a guidance's step rules, such as ``state.rule.strength``."""
    found: list[str] = []

    def look(thing: Any, path: str) -> None:
        for field in fields(thing) if is_dataclass(thing) else ():
            inner = getattr(thing, field.name)
            if field.name == "strength":
                found.append(f"{path}.strength")
            elif is_dataclass(inner):
                look(inner, f"{path}.{field.name}")

    for name in ("state", "clean") if isinstance(guidance, Guidance) else ("rule",):
        look(getattr(guidance, name), name)
    return found


def chosen_knobs(
    guidance: Searched, names: str | None, begin: float, factor: float | None, trials: int
) -> list[Knob]:
    """The knobs of a search, each with its first value in place of a start.

    A search of several is the greedy beam of TFG (Ye et al. 2024), with its factors for what it
    turns: 2 for ``rho`` and ``mu``, 10 for ``sigma``. Its start and its caps (8, 8 and 1) are fixed
    values; here a search starts from the experiment's own, and a knob ends ``trials`` steps on.

    Args:
        names: fields with commas between; all strengths by default.
        begin: the first value, as a multiple of the guidance's own. What counts something starts
            where it is.
        factor: from one value to the next; by default TFG's for what TFG turns, else 2.
        trials: settings that will be tried, which a line has as many values as.

    Raises:
        FewstepError: if there is no such number, or the range leads nowhere.
    """
    if trials < 1 or begin <= 0:
        raise FewstepError(
            f"A search has 1 trial or more and begins above 0; got trials: {trials}, begin: "
            f"{begin:g}."
        )
    asked = names.split(",") if names else strengths(guidance)
    if not asked:
        raise FewstepError(
            "This guidance has no rule with a strength; name the numbers to search over with "
            "--knobs, such as --knobs recurrence.count."
        )
    return [_knob(guidance, one.strip(), begin, factor, trials) for one in asked]


def first_value(guidance: Searched, field: str, begin: float) -> float:
    """Where a number's search begins."""
    value = read_number(guidance, field)
    counts = read_number(with_number(guidance, field, 2.4), field) == 2
    return value if counts else value * begin


def started(guidance: Searched, knobs: Sequence[Knob], begin: float) -> Searched:
    """The guidance with each number where its search begins."""
    first = {knob.field: first_value(guidance, knob.field, begin) for knob in knobs}
    return configured(guidance, first)


def _knob(guidance: Searched, field: str, begin: float, factor: float | None, trials: int) -> Knob:
    first, factor = first_value(guidance, field, begin), factor or FACTORS.get(field, 2.0)
    return Knob(field, first * factor ** (trials - 1), factor)

"""What a person sees of a search."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.guidance import SearchResult, Trial
from scripts.guidance.records import Look, Records


def table(found: SearchResult, records: Records) -> str:
    """All trials of a search by their numbers, the winner with a star, under unguided samples.

    The tuner's score and, where there is a bound on it, the distance from data are told for each
    number of steps.
    """
    names = list(found.trials[0].values)
    measured = any(look.distance is not None for look in records.unguided or [])
    steps = [f"{look.num_steps} steps" for look in records.unguided or []]
    heads = [*names, "score", "+-", *steps]
    heads += [f"{step}: distance" for step in steps] if measured else []
    rows = [_row(["unguided", *[""] * (len(names) - 1)], None, records.unguided or [], measured)]
    best = found.ranked[0] if found.ranked else None
    for trial in sorted(found.trials, key=lambda one: tuple(one.values.values())):
        numbers = [f"{value:.4g}" for value in trial.values.values()]
        row = _row(numbers, trial, records.looks_at(trial), measured)
        row += [""] * (len(heads) - len(row))
        rows.append([*row, "*" if trial is best else (trial.failure or "").partition(". ")[0]])
    return _aligned([heads, *rows])


def notes(found: SearchResult, records: Records, name: str) -> list[str]:
    """What is to be known of a winner: how it was found and did, and whether to look farther."""
    about, best = records.about, found.best
    values = ", ".join(f"{field} {value:.4g}" for field, value in best.values.items())
    steps = ", ".join(map(str, about["steps"]))
    chosen = [
        f"fewstep guidance search -c {name}: {values}, the best of {len(found.trials)} settings by",
        f"{about['samples']} samples each at {steps} steps. Score: {about['score']}; bound:",
        f"{about['bound']}.",
        f"Score {best.score:.4g}"
        + (f" +- {best.error:.2g}" if best.error is not None else "")
        # Of many settings the best is a little lucky.
        + "; measure it again from other noise, with `fewstep evaluate`.",
    ]
    for field, value in best.values.items() if len(best.values) == 1 else ():
        tried = sorted(trial.values[field] for trial in found.trials)
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            end = "smallest" if value == tried[0] else "largest"
            chosen.append(f"It is the {end} {field} tried: look farther with --begin.")
    return chosen


def _row(
    numbers: Sequence[str], trial: Trial | None, looks: Sequence[Look], measured: bool
) -> list[str]:
    score = error = ""
    if trial is None:
        score = f"{sum(look.score for look in looks) / len(looks):.4g}" if looks else ""
    elif trial.score is not None:
        score = f"{trial.score:.4g}"
        error = "" if trial.error is None else f"{trial.error:.2g}"
    row = [*numbers, score, error, *(f"{look.score:.4g}" for look in looks)]
    if measured:
        row += ["" if look.distance is None else f"{look.distance:.3g}" for look in looks]
    return row


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width; what goes beyond the head is a remark."""
    count = len(rows[0])
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(count)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, *row[count:]]).rstrip())
    return "\n".join(lines)

"""Errors that name the difference between a checkpoint and the run that should take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fewstep.errors import FewstepError
from fewstep.spec import with_defaults


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(set(there) | set(here)):
            found += _differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
        return found
    if there == here:
        return []
    return [f"{path}: {_short(there)} in the checkpoint, {_short(here)} in this run"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_same_experiment(stored: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Compares a checkpoint's metadata with the run's own.

    The frozen roles' source path may differ (a checkpoint moves between machines), their hash
    may not.

    Raises:
        FewstepError: naming each difference.
    """
    if stored is None:
        raise FewstepError("This checkpoint was not written by fewstep; it cannot be resumed from.")
    ignored = {"student_updates", "frozen", "training", "sampling"}
    found = _differences(
        with_defaults({k: v for k, v in stored.items() if k not in ignored}),
        with_defaults({k: v for k, v in current.items() if k not in ignored}),
    )
    there, here = (
        {role: origin.get("sha256") for role, origin in side["frozen"].items()}
        for side in (stored, current)
    )
    found += _differences(there, here, "frozen role's sha256")
    if found:
        listed = "\n  ".join(found)
        raise FewstepError(
            f"The checkpoint is of another experiment:\n  {listed}\n"
            "Give the checkpoint of this experiment, or the experiment file it was trained with "
            "(config.yaml in its run folder)."
        )


def load_strictly(
    load: Callable[..., Any], state: Any, frozen_roles: Sequence[str], assign: bool
) -> Any:
    """Calls ``load`` and raises unless all but frozen roles' entries match.

    Raises:
        FewstepError: naming the first missing or unknown entries.
    """
    result = load(state, strict=False, assign=assign)
    prefixes = tuple(f"{role}." for role in frozen_roles)
    missing = [n for n in result.missing_keys if not (prefixes and n.startswith(prefixes))]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name}" for name in result.unexpected_keys]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise FewstepError(
            f"The checkpoint does not fit this run: {', '.join(problems[:4])}{more}. "
            "Was it trained with other options (EMA, adversarial term, architecture)?"
        )
    return result

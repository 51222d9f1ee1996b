"""The one exception type the command line turns into a single readable message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewstepError(Exception):
    """A mistake the user can mend; its message says what is wrong and what to do next."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the choice most like ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def require_at_least(least: int, **given: int) -> None:
    """Refuses numbers that are too small.

    Args:
        least: what each may be at the smallest.
        given: the numbers, by the names that the user knows them by.

    Raises:
        FewstepError: naming the first that is.
    """
    for name, number in given.items():
        if number < least:
            raise FewstepError(f"{name} must be at least {least}, not {number}.")

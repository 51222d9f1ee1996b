"""Which reference record lends a generated sample its condition."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, sqrt


def spread(numbers: Sequence[int], total: int) -> list[int]:
    """Maps samples to records so that any first so many samples see evenly spread records.

    Steps through the records by about the golden share of them, which leaves gaps as even as can
    be: shards sorted by class still lend every class alike. The first ``total`` samples take every
    record once.
    """
    step = max(1, round(total * (sqrt(5) - 1) / 2))
    while gcd(step, total) != 1:
        step += 1
    return [number * step % total for number in numbers]

"""Mean and standard deviation of many arrays, a channel at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Moments:
    """Sums over values of each channel; adding two of them joins their values.

    Attributes:
        count: number of values a channel.
        total, squares: ``(C,)`` sums of the values and of their squares.
    """

    count: int = 0
    total: npt.NDArray[np.float64] | float = 0.0
    squares: npt.NDArray[np.float64] | float = 0.0

    @classmethod
    def of(cls, values: Any, std: Any = None) -> Moments:
        """The sums of an array ``(C, ...)``.

        Args:
            values: the values, or the means of Gaussians.
            std: standard deviations of those Gaussians, if they are.
        """
        flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
        squares = (flat**2).sum(axis=1)
        if std is not None:
            squares = squares + (np.asarray(std, dtype=np.float64) ** 2).reshape(len(std), -1).sum(
                1
            )
        return cls(flat.shape[1], flat.sum(axis=1), squares)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of each channel, ``(C,)``."""
        return np.atleast_1d(self.total) / self.count

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Standard deviation of each channel, ``(C,)``."""
        return np.sqrt(np.maximum(np.atleast_1d(self.squares) / self.count - self.mean**2, 0))

    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all channels together."""
        mean = float(self.mean.mean())
        second = float(np.mean(np.atleast_1d(self.squares)) / self.count)
        return mean, float(np.sqrt(max(second - mean**2, 0.0)))

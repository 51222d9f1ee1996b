"""Energies of trajectories: where they end and what they keep clear of (Shen et al. 2024, eq. 8).

The released code averages them over the batch, which ties samples together; here each has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.tables import Table
from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, needed, safe_length
from fewstep.watermark import watermark


class Positions(ABC):
    """Makes positions ``(N, F, D)`` over time of samples ``(N, ...)``, differentiably."""

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor: ...


MakesPositions = Positions | Callable[[Tensor], Tensor]


def _paths(x0: Tensor, positions: MakesPositions | None) -> Tensor:
    """Positions ``(N, F, D)`` over time."""
    paths = x0 if positions is None else positions(x0)
    if paths.ndim != 3:
        raise FewstepError(
            f"Trajectories are positions (N, F, D) over time, not of shape {tuple(paths.shape)}. "
            "Set positions to a function that makes them of samples."
        )
    return paths


@cache
def _opacity(size: int) -> Table:
    """The watermark's opacity ``(H, H)``."""
    return Table(torch.from_numpy(watermark(size)))


@cache
def _points(points: tuple[tuple[float, ...], ...]) -> Table:
    """Points ``(O, D)``, copied to a device once."""
    return Table(torch.tensor(points, dtype=torch.float64))


@dataclass(frozen=True)
class InkCentres(Positions):
    """Where the ink of moving digits is: positions for the energies here, x and y in pixels.

    Grey videos ``(N, 1, F, H, H)`` in [-1, 1] to ``(N, F, 2)`` from the top left pixel, nearly as
    :func:`fewstep.metrics.tracks` measures them, but differentiable: a pixel's worth of ink is
    taken to be in the middle, where frames without any have their centre. Light beyond white, which
    no picture can show, does not count.

    Args:
        mark: how much of the watermark the videos have on them, from 0 to 1; it is taken off.
        faint: light that is taken for background.
    """

    mark: float = 0.0
    faint: float = 0.1

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim != 5 or x0.shape[1] != 1 or x0.shape[-1] != x0.shape[-2]:
            raise FewstepError(
                "InkCentres looks at square grey videos (N, 1, F, H, H), not at samples of shape "
                f"{tuple(x0.shape)}."
            )
        mark = self.mark * _opacity(x0.shape[-1]).on(x0.device).to(x0.dtype)
        light = ((x0[:, 0] + 1) / 2 - mark) / (1 - mark)
        ink = (light.clamp_max(1) - self.faint).clamp_min(0)
        places = torch.arange(ink.shape[-1], dtype=ink.dtype, device=ink.device)
        total, middle = ink.sum((-1, -2)), places.mean()
        sums = [(ink.sum(-2) * places).sum(-1), (ink.sum(-1) * places).sum(-1)]
        return torch.stack([(each + middle) / (total + 1) for each in sums], -1)


@dataclass(frozen=True)
class FinalPosition(Energy):
    """Squared distance of a trajectory's end from a point; the target ``(N, D)``.

    Args:
        positions: makes positions of samples, such as :class:`InkCentres`; by default samples are
            positions.
        form: ``square`` as in the paper, or ``norm``.
    """

    positions: MakesPositions | None = None
    form: Literal["square", "norm"] = "square"

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = needed(target, self, "the point (N, D) where each trajectory should end", x0)
        gap = _paths(x0, self.positions)[:, -1] - wanted
        return safe_length(gap) if self.form == "norm" else gap.square().sum(-1)


@dataclass(frozen=True)
class ObstacleAvoidance(Energy):
    """A penalty on every frame that is inside an obstacle.

    ``height * sum over frames of sigmoid(steepness * (radius + margin - distance))``. The target is
    the obstacle's centre ``(N, D)``, or those of several ``(N, O, D)``; it needs none where all
    samples have the same obstacles.

    Args:
        radius: of an obstacle, in the positions' unit.
        margin: a safety margin that guidance keeps and :meth:`hits` does not ask for; the released
            code has 0.2 for a radius of 1.
        steepness, height: 50 and 100 in the paper. Far inside a steep penalty is flat: lower the
            steepness where trajectories start deep in an obstacle.
        reduction: over frames and obstacles; ``sum`` as in the paper, ``mean`` as released.
        positions: see :class:`FinalPosition`.
        centres: of the obstacles of all samples, ``D`` numbers each; then it takes no target.

    Raises:
        FewstepError: for centres that are none, or of unlike dimensions.
    """

    radius: float
    margin: float = 0.0
    steepness: float = 50.0
    height: float = 100.0
    reduction: Literal["sum", "mean"] = "sum"
    positions: MakesPositions | None = None
    centres: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.centres is not None and len({len(centre) for centre in self.centres}) != 1:
            raise FewstepError(
                "ObstacleAvoidance.centres are points, D numbers each: [[7.5, 7.5]] is one in the "
                f"plane; got {list(self.centres)}."
            )

    def distances(self, x0: Tensor, target: Target) -> Tensor:
        """From each frame to each obstacle, ``(N, F, O)``."""
        what = "the centres (N, D) or (N, O, D) of each one's obstacles"
        paths = _paths(x0, self.positions)
        if self.centres is None:
            centres = needed(target, self, what, x0)
            centres = centres[:, None] if centres.ndim == 2 else centres
        elif target is None:
            shared = tuple(tuple(map(float, centre)) for centre in self.centres)
            centres = _points(shared).on(x0.device).to(x0.dtype)[None]
        else:
            raise FewstepError(
                "ObstacleAvoidance was given centres for all samples and a target as well. Leave "
                "out one of them; in experiments that is steering.target: null."
            )
        if centres.shape[-1] != paths.shape[-1]:
            raise FewstepError(
                f"Obstacles in {centres.shape[-1]} dimensions, paths in {paths.shape[-1]}."
            )
        return safe_length(paths[:, :, None] - centres[:, None])

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        inside = self.radius + self.margin - self.distances(x0, target)
        penalty = self.height * torch.sigmoid(self.steepness * inside).flatten(1)
        return penalty.sum(1) if self.reduction == "sum" else penalty.mean(1)

    def hits(self, x0: Tensor, target: Target) -> Tensor:
        """Whether a trajectory enters an obstacle, ``(N,)`` bool, without the margin."""
        return (self.distances(x0, target) < self.radius).flatten(1).any(1)

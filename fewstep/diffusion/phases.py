"""Solver grids and their division into phases (PCM, sections 3.1 and 3.2).

Edges decide both what a student is trained to reach and where the sampler may stop, so they are
computed once here, stored with every checkpoint and read back, never recomputed from a step count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedules import Schedule
from fewstep.diffusion.tables import Table
from fewstep.errors import FewstepError


class TimeGrid:
    """``N`` solver points and, for each, the point one solver step below.

    Attributes:
        times: ``t_0 < ... < t_{N-1} = t_max``, float64 table.
        previous: ``p_i = t_{i-1}``, with ``p_0 = t_min``, float64 table.
    """

    def __init__(self, times: Tensor, t_min: float) -> None:
        bounds = torch.cat([torch.tensor([t_min], dtype=torch.float64), times.double()])
        # N = T puts the first grid point on t_min itself: a step of length zero, which is harmless.
        if (bounds.diff()[1:] <= 0).any() or bounds[1] < bounds[0]:
            raise ValueError("Grid times must increase strictly from t_min.")
        self.t_min = t_min
        self.times = Table(bounds[1:])
        self.previous = Table(bounds[:-1])

    @classmethod
    def uniform(cls, schedule: Schedule, num_points: int) -> TimeGrid:
        """The ``num_points``-point grid of a schedule (``t_i = (i + 1) T / N - 1`` for VP)."""
        return cls(schedule.grid_times(num_points), schedule.t_min)

    def __len__(self) -> int:
        return len(self.times.home)

    def solver_path(self, schedule: Schedule, num_substeps: int) -> Table:
        """Times a solver visits from each grid point to the previous one, ``(N, K + 1)``.

        Substeps lie on the grid of ``N K`` points, which contains this one.

        Raises:
            FewstepError: if the schedule has no such grid.
        """
        fine = TimeGrid.uniform(schedule, len(self) * num_substeps)
        below = fine.previous.home.reshape(len(self), num_substeps).flip(1)
        return Table(torch.cat([self.times.home[:, None], below], dim=1))


class PhaseSchedule:
    """``M`` phases over a grid; within each, the student jumps to the phase's lower edge.

    Phase ``j`` begins at grid index ``e_j = floor(j N / M)`` and its edge is
    ``s_j = previous[e_j]``, so a time ``t`` belongs to phase ``j`` iff ``s_j < t <= s_{j+1}``:
    an edge, as a network input, belongs to the lower phase.

    Attributes:
        edges: ``s_0 = t_min < s_1 < ... < s_M = t_max``, float64 table ``(M + 1,)``.
        edge_of: for each grid index, the edge below it, ``(N,)``.
        upper_edge_of: for each grid index, the edge at or above it, ``(N,)``.
        last_index: for each phase, the grid index of its upper edge, which is where samplers
            enter it, ``(M,)`` integers.

    Raises:
        FewstepError: unless ``1 <= num_phases <= len(grid)``.
    """

    def __init__(self, grid: TimeGrid, num_phases: int) -> None:
        num_points = len(grid)
        if not 1 <= num_phases <= num_points:
            raise FewstepError(
                f"{num_phases} phases do not fit a grid of {num_points} solver points; "
                f"choose num_phases between 1 and {num_points}."
            )
        self.grid = grid
        self.num_phases = num_phases
        first_index = torch.arange(num_phases) * num_points // num_phases
        phase_of = torch.bucketize(torch.arange(num_points), first_index, right=True) - 1
        edges = torch.cat([grid.previous.home[first_index], grid.times.home[-1:]])
        self.edges = Table(edges)
        self.edge_of = Table(edges[phase_of])
        self.upper_edge_of = Table(edges[phase_of + 1])
        ends = torch.cat([first_index[1:], torch.tensor([num_points])])
        self.last_index = Table(ends - 1)

    def sampling_times(self, num_steps: int, allow_untrained: bool = False) -> Tensor:
        """The descending times a sampler visits, ``(num_steps + 1,)``, last one ``t_min``.

        A student with ``M`` phases serves ``M`` steps. Fewer would skip edges, a jump it was never
        trained for; ``allow_untrained`` permits that (never more than ``M``).

        Raises:
            FewstepError: for a step count the phases do not serve.
        """
        untrained = 1 <= num_steps < self.num_phases and allow_untrained
        if num_steps != self.num_phases and not untrained:
            raise FewstepError(
                f"This student has {self.num_phases} phases and serves {self.num_phases} sampling "
                f"steps, not {num_steps}. Ask for {self.num_phases} steps, train a student with "
                f"num_phases: {num_steps}, or (for fewer steps, at a loss of quality) set "
                "allow_untrained_steps: true."
            )
        descending = self.edges.home.flip(0)
        starts = torch.arange(num_steps) * self.num_phases // num_steps
        return torch.cat([descending[starts], descending[-1:]])

    def to_config(self) -> dict[str, Any]:
        """Plain values that fix the schedule, for checkpoints and exported schedulers."""
        return {
            "t_min": self.grid.t_min,
            "times": self.grid.times.home.tolist(),
            "num_phases": self.num_phases,
            "edges": self.edges.home.tolist(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PhaseSchedule:
        """Reads back :meth:`to_config`.

        Raises:
            FewstepError: if the stored edges are not those of the stored grid.
        """
        grid = TimeGrid(torch.tensor(config["times"], dtype=torch.float64), config["t_min"])
        phases = cls(grid, config["num_phases"])
        if phases.edges.home.tolist() != config["edges"]:
            raise FewstepError(
                "The checkpoint's phase edges do not follow from its grid; it was written by an "
                "incompatible version or has been altered."
            )
        return phases

from __future__ import annotations

import json

import pytest
import torch

from fewstep.diffusion import FlowSchedule, PhaseSchedule, Schedule, TimeGrid, VPSchedule
from fewstep.errors import FewstepError

# PCM's tables of visited train indices; all end at index 0.
VISITED = {
    (50, 1): "999",
    (40, 1): "999",
    (100, 1): "999",
    (50, 2): "999 499",
    (40, 2): "999 499",
    (100, 2): "999 499",
    (50, 4): "999 739 499 239",
    (40, 4): "999 749 499 249",
    (100, 4): "999 749 499 249",
    (50, 5): "999 799 599 399 199",
    (40, 5): "999 799 599 399 199",
    (100, 5): "999 799 599 399 199",
    (50, 8): "999 859 739 619 499 359 239 119",
    (40, 8): "999 874 749 624 499 374 249 124",
    (100, 8): "999 869 749 619 499 369 249 119",
    (50, 16): "999 919 859 799 739 679 619 559 499 419 359 299 239 179 119 59",
    (40, 16): "999 924 874 799 749 674 624 549 499 424 374 299 249 174 124 49",
    # e_j = floor(100 j / 16) = 0 6 12 18 25 31 37 43 50 ..., edge 10 e_j - 1.
    (100, 16): "999 929 869 809 749 679 619 559 499 429 369 309 249 179 119 59",
}
SCHEDULES = [
    VPSchedule(),
    VPSchedule(trajectory_end="clean"),
    FlowSchedule(),
    FlowSchedule(3.0, trajectory_end="first_index"),
]


def phases(num_points: int, num_phases: int, schedule: Schedule | None = None) -> PhaseSchedule:
    return PhaseSchedule(TimeGrid.uniform(schedule or VPSchedule(), num_points), num_phases)


@pytest.mark.parametrize(("num_points", "num_phases"), VISITED)
def test_visited_times_are_those_of_the_paper(num_points: int, num_phases: int) -> None:
    visited = [int(t) for t in VISITED[num_points, num_phases].split()]
    schedule = phases(num_points, num_phases)
    assert schedule.sampling_times(num_phases).tolist() == [*visited, 0]
    assert schedule.edges.home.tolist() == [0, *visited[::-1]]


@pytest.mark.parametrize(
    ("num_points", "shift", "sigmas"),
    [
        (100, 1.0, [1, 0.75, 0.5, 0.25, 0.001]),
        (100, 3.0, [1, 0.9, 0.75, 0.5, 3 / 1002]),
        (50, 1.0, [1, 0.74, 0.5, 0.24, 0.001]),
        (50, 3.0, [1, 0.8952, 0.75, 0.4865, 3 / 1002]),
    ],
)
def test_flow_edges_are_those_of_the_paper(
    num_points: int, shift: float, sigmas: list[float]
) -> None:
    released = phases(num_points, 4, FlowSchedule(shift, trajectory_end="first_index"))
    assert (released.sampling_times(4) / 1000).tolist() == pytest.approx(sigmas, abs=5e-5)
    clean = phases(num_points, 4, FlowSchedule(shift))
    assert (clean.sampling_times(4) / 1000).tolist() == pytest.approx([*sigmas[:-1], 0], abs=5e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_points", [8, 40, 50, 100])
@pytest.mark.parametrize("num_phases", [1, 2, 3, 4, 7, 8])
def test_phases_divide_the_grid(schedule: Schedule, num_points: int, num_phases: int) -> None:
    division = phases(num_points, num_phases, schedule)
    edges = division.edges.home
    times, previous = division.grid.times.home, division.grid.previous.home
    lower, upper = division.edge_of.home, division.upper_edge_of.home

    assert len(edges) == num_phases + 1
    assert (edges.diff() > 0).all()
    assert edges[0] == schedule.t_min
    assert edges[-1] == times[-1] == schedule.t_max
    # Each index lies in exactly one phase (s_j, s_{j+1}], and it is the one recorded for it.
    inside = (edges[:-1] < times[:, None]) & (times[:, None] <= edges[1:])
    assert inside.sum(1).eq(1).all()
    assert torch.equal(lower, edges[:-1].expand_as(inside)[inside])
    assert torch.equal(upper, edges[1:].expand_as(inside)[inside])
    # Samplers enter each phase at its upper edge.
    assert torch.equal(times[division.last_index.home], edges[1:])
    # A solver step never leaves the phase; it ends on the edge from the phase's first index only.
    assert (previous >= lower).all()
    first = torch.cat([torch.tensor([True]), lower.diff() > 0])
    assert torch.equal(previous == lower, first)


@pytest.mark.parametrize("num_points", [5, 40])
def test_as_many_phases_as_points_make_every_jump_a_solver_step(num_points: int) -> None:
    division = phases(num_points, num_points)
    assert torch.equal(division.edge_of.home, division.grid.previous.home)


def test_the_grid_of_50_steps_every_20_indices() -> None:
    grid = TimeGrid.uniform(VPSchedule(), 50)
    assert len(grid) == 50
    assert grid.times.home.tolist() == list(range(19, 1000, 20))
    assert grid.previous.home.tolist() == [0, *range(19, 980, 20)]
    clean = TimeGrid.uniform(VPSchedule(trajectory_end="clean"), 50)
    assert clean.previous.home.tolist() == [-1, *range(19, 980, 20)]


def test_a_grid_on_every_train_index_is_allowed() -> None:
    grid = TimeGrid.uniform(VPSchedule(), 1000)
    assert grid.times.home.tolist() == list(range(1000))


def test_a_grid_that_does_not_increase_is_refused() -> None:
    with pytest.raises(ValueError, match="increase"):
        TimeGrid(torch.tensor([10.0, 10.0]), 0.0)


@pytest.mark.parametrize("num_phases", [0, -1, 41])
def test_impossible_phase_counts_are_refused_by_number(num_phases: int) -> None:
    with pytest.raises(FewstepError, match=rf"{num_phases} phases .* 40 .*num_phases.* 1 and 40"):
        phases(40, num_phases)


def test_a_grid_that_does_not_divide_the_train_steps_is_refused() -> None:
    with pytest.raises(FewstepError, match="64 solver points"):
        phases(64, 4)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5, 8, -1])
def test_untrained_step_counts_are_refused_by_number(num_steps: int) -> None:
    with pytest.raises(FewstepError, match=rf"not {num_steps}\b.*num_phases: {num_steps}"):
        phases(40, 4).sampling_times(num_steps)


@pytest.mark.parametrize("num_steps", [0, 5, 16])
def test_no_option_permits_more_steps_than_phases_or_none(num_steps: int) -> None:
    with pytest.raises(FewstepError, match=f"not {num_steps}"):
        phases(40, 4).sampling_times(num_steps, allow_untrained=True)


def test_fewer_steps_skip_edges_but_visit_no_other_times() -> None:
    division = phases(40, 8)
    assert division.sampling_times(4, allow_untrained=True).tolist() == [999, 749, 499, 249, 0]
    assert division.sampling_times(1, allow_untrained=True).tolist() == [999, 0]
    three = division.sampling_times(3, allow_untrained=True)
    assert set(three.tolist()) <= set(division.edges.home.tolist())
    assert (three.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stored_schedule_is_read_back_bit_for_bit(schedule: Schedule) -> None:
    division = phases(50, 8, schedule)
    stored = json.loads(json.dumps(division.to_config()))
    read = PhaseSchedule.from_config(stored)
    assert torch.equal(read.edges.home, division.edges.home)
    assert torch.equal(read.edge_of.home, division.edge_of.home)
    assert torch.equal(read.upper_edge_of.home, division.upper_edge_of.home)
    assert torch.equal(read.grid.previous.home, division.grid.previous.home)
    assert read.to_config() == division.to_config()


def test_altered_edges_are_noticed() -> None:
    stored = phases(50, 4).to_config()
    stored["edges"][1] = 249.0
    with pytest.raises(FewstepError, match="edges"):
        PhaseSchedule.from_config(stored)

from __future__ import annotations

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.guidance import FinalPosition, ObstacleAvoidance


def line(*points: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(points).double()[None]


def test_the_end_of_a_trajectory_is_compared_with_its_target() -> None:
    paths = torch.cat([line((0, 0), (3, 4)), line((9, 9), (1, 1))]).requires_grad_()
    target = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    torch.testing.assert_close(FinalPosition()(paths, target), torch.tensor([25.0, 0.0]).double())
    norm = FinalPosition(form="norm")(paths, target)
    torch.testing.assert_close(norm, torch.tensor([5.0, 0.0]).double())
    (gradient,) = torch.autograd.grad(norm.sum(), paths)
    torch.testing.assert_close(gradient[0, 1], torch.tensor([0.6, 0.8]).double())
    assert not gradient[:, 0].any()
    assert not gradient[1].any()


def test_the_penalty_is_the_papers_equation_for_each_sample() -> None:
    paths = torch.cat([line((0, 0), (0.9, 0), (2, 0)), line((5, 5), (6, 6), (7, 7))])
    centre = torch.zeros(2, 2).double()
    loss = ObstacleAvoidance(1.0)(paths, centre)
    distance = paths.norm(dim=-1)
    expected = (100 * torch.sigmoid(-50 * (distance - 1.0))).sum(1)
    torch.testing.assert_close(loss, expected)
    assert float(loss[0]) > 190
    assert float(loss[1]) < 1e-6
    mean = ObstacleAvoidance(1.0, reduction="mean")(paths, centre)
    torch.testing.assert_close(mean, expected / 3)
    alone = ObstacleAvoidance(1.0)(paths[:1], centre[:1])
    torch.testing.assert_close(alone, loss[:1])


def test_a_margin_is_kept_but_not_asked_for() -> None:
    path = line((1.1, 0), (3, 0)).requires_grad_()
    centre = torch.zeros(1, 2).double()
    wide, narrow = ObstacleAvoidance(1.0, margin=0.2), ObstacleAvoidance(1.0)
    assert float(wide(path, centre).detach()) > 90
    assert float(narrow(path, centre).detach()) < 1
    assert wide.hits(path, centre).tolist() == [False]
    assert wide.hits(line((0.9, 0), (3, 0)), centre).tolist() == [True]


def test_several_obstacles_count_each_and_a_centre_has_a_finite_gradient() -> None:
    path = line((0, 0), (5, 0)).requires_grad_()
    centres = torch.tensor([[[0.0, 0.0], [5.0, 0.0]]]).double()
    energy = ObstacleAvoidance(1.0, steepness=2.0)
    both = energy(path, centres)
    each = sum(energy(path, centres[:, i]) for i in range(2))
    torch.testing.assert_close(both, each)
    (gradient,) = torch.autograd.grad(both.sum(), path)
    assert bool(gradient.isfinite().all())


def test_positions_are_made_of_samples_or_asked_for() -> None:
    samples = torch.randn(2, 6)
    energy = FinalPosition(positions=lambda x: x.unflatten(1, (3, 2)))
    torch.testing.assert_close(energy(samples, samples[:, 4:]), torch.zeros(2))
    with pytest.raises(FewstepError, match="Set positions"):
        FinalPosition()(samples, samples[:, 4:])
    with pytest.raises(FewstepError, match="needs a target"):
        ObstacleAvoidance(1.0)(torch.zeros(1, 2, 2), None)

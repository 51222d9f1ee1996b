from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.moving_clips import Kind
from fewstep.errors import FewstepError
from fewstep.guidance import FinalPosition, InkCentres, ObstacleAvoidance

from guided import randn
from moving_samples import digit_clips


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


def test_obstacles_of_all_samples_need_no_target() -> None:
    paths, centres = randn(3, 5, 2), [[0.5, -0.25], [1.0, 1.0]]
    each = torch.tensor(centres, dtype=paths.dtype).expand(3, 2, 2)
    shared, told = (ObstacleAvoidance(0.5, steepness=4.0, centres=c) for c in (centres, None))
    torch.testing.assert_close(shared(paths, None), told(paths, each))
    with pytest.raises(FewstepError, match="a target as well"):
        shared(paths, each)
    with pytest.raises(FewstepError, match="needs a target: the centres"):
        told(paths, None)
    with pytest.raises(FewstepError, match="Obstacles in 3 dimensions, paths in 2"):
        ObstacleAvoidance(0.5, centres=[[0.0, 0.0, 0.0]])(paths, None)
    with pytest.raises(FewstepError, match="Obstacles in 1 dimensions"):
        ObstacleAvoidance(0.5, centres=[[7.5]])(paths, None)
    for wrong in ([], [[1.0, 2.0], [1.0]]):
        with pytest.raises(FewstepError, match="centres are points"):
            ObstacleAvoidance(0.5, centres=wrong)


def test_positions_are_made_of_samples_or_asked_for() -> None:
    samples = torch.randn(2, 6)
    energy = FinalPosition(positions=lambda x: x.unflatten(1, (3, 2)))
    torch.testing.assert_close(energy(samples, samples[:, 4:]), torch.zeros(2))
    with pytest.raises(FewstepError, match="Set positions"):
        FinalPosition()(samples, samples[:, 4:])
    with pytest.raises(FewstepError, match="needs a target"):
        ObstacleAvoidance(1.0)(torch.zeros(1, 2, 2), None)


@pytest.mark.parametrize(("kind", "mark"), [("clear", 0.0), ("watermarked", 1.0)])
def test_ink_is_where_digits_are(kind: Kind, mark: float) -> None:
    pixels, clips = digit_clips(kind, 40, num_frames=8, size=16, max_digits=1)
    centres = torch.from_numpy(np.stack([clip.centres[0] for clip in clips]))
    off = (InkCentres(mark)(pixels.double()) - centres).norm(dim=-1)
    assert float(off.mean()) < 0.25
    if mark:
        assert float((InkCentres()(pixels.double()) - centres).norm(dim=-1).mean()) > 0.8


def test_centres_of_ink_can_be_differentiated_and_black_is_in_the_middle() -> None:
    clips = torch.rand(2, 1, 2, 6, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.autograd.gradcheck(InkCentres(0.5), clips.requires_grad_())
    black = InkCentres()(torch.full((1, 1, 3, 16, 16), -1.0))
    torch.testing.assert_close(black, torch.full((1, 3, 2), 7.5))


def test_a_gradient_step_moves_the_ink_of_the_last_frame_towards_the_target() -> None:
    pixels, _ = digit_clips("clear", 8, num_frames=4, size=16, max_digits=1)
    energy = FinalPosition(InkCentres())
    target = torch.full((8, 2), 4.0)
    x0 = pixels.clone().requires_grad_()
    before = energy(x0, target)
    (gradient,) = torch.autograd.grad(before.sum(), x0)
    assert (energy(x0 - 0.05 * gradient, target) < before).all()
    assert torch.equal(gradient[:, :, :-1], torch.zeros_like(gradient[:, :, :-1]))


def test_ink_is_looked_for_in_grey_videos_alone() -> None:
    for shape in ((2, 3, 4, 8, 8), (2, 1, 8, 8), (2, 1, 4, 8, 6)):
        with pytest.raises(FewstepError, match="grey videos"):
            InkCentres()(torch.zeros(shape))

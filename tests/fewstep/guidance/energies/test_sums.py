from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Decoded,
    DiffAugment,
    EachFrame,
    Energy,
    FinalPosition,
    Guidance,
    LinearMeasurement,
    Matrix,
    Objective,
    Scheduled,
    Smoothing,
    Sum,
    Target,
    guided_sample,
    plan_steps,
)

from guided import MATRIX, NOISE, TARGET, TIMES, randn

STEP = plan_steps(VPSchedule(), VPSchedule().spaced_times(4), DDIM())[2]
OTHER = LinearMeasurement(Matrix(randn(1, 4, seed=8)), "gaussian")


class Size(Energy):
    minimum = -1.0

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        return x0.flatten(1).square().mean(1) - 1


BOTH = Sum({"first": MATRIX, "second": OTHER, "size": Size()}, {"second": 3.0, "size": 0.5})
AIMS = {"first": TARGET, "second": randn(3, 1, seed=9)}


def test_a_sum_is_weighted_and_each_part_gets_its_own_target() -> None:
    loss = BOTH(NOISE, AIMS)
    expected = MATRIX(NOISE, TARGET) + 3 * OTHER(NOISE, AIMS["second"]) + 0.5 * Size()(NOISE, None)
    torch.testing.assert_close(loss, expected)
    assert BOTH.minimum == -0.5
    outer = Sum({"inner": BOTH, "size": Size()})
    torch.testing.assert_close(outer(NOISE, {"inner": AIMS}), loss + Size()(NOISE, None))
    alone = BOTH(NOISE[1:2], {name: aim[1:2] for name, aim in AIMS.items()})
    torch.testing.assert_close(alone, loss[1:2])


def test_one_part_alone_may_be_told_what_is_wanted() -> None:
    told = Sum({"first": MATRIX, "size": Size()}, told="first")
    expected = MATRIX(NOISE, TARGET) + Size()(NOISE, None)
    torch.testing.assert_close(told(NOISE, TARGET), expected)
    torch.testing.assert_close(told(NOISE, {"first": TARGET}), expected)
    assert not hasattr(told, "encode")  # as MATRIX reads no captions
    torch.testing.assert_close(told.encode_images(NOISE), MATRIX.encode_images(NOISE))
    framed = Sum({"size": Size(), "each": EachFrame(Reads())}, told="each")
    assert framed.encode(["a", "bcd"]).tolist() == [[1.0], [3.0]]
    assert not hasattr(framed, "encode_images")
    assert not hasattr(BOTH, "encode_images")
    with pytest.raises(FewstepError, match=r"`told` is 'third', which is no part"):
        Sum({"first": MATRIX}, told="third")


class Reads(Size):
    """Knows a caption by its length."""

    def encode(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(len(prompt))] for prompt in prompts])


def test_several_views_of_a_sample_get_its_own_targets() -> None:
    objective = Objective(BOTH, smoothing=Smoothing(0.3, copies=5, relative=False))
    draws = [torch.Generator().manual_seed(row) for row in range(3)]
    together = objective.drawn(NOISE, AIMS, STEP, draws)(NOISE)
    for row in range(3):
        aims = {name: aim[row : row + 1] for name, aim in AIMS.items()}
        one = [torch.Generator().manual_seed(row)]
        alone = objective.drawn(NOISE[row : row + 1], aims, STEP, one)(NOISE[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


def test_a_sampler_takes_a_sums_targets(net: Any) -> None:
    plain = guided_sample(net, NOISE, None, TIMES, Guidance(MATRIX, Scheduled(0.3)), TARGET)
    summed = Sum({"one": MATRIX})
    guidance = Guidance(summed, Scheduled(0.3))
    found = guided_sample(net, NOISE, None, TIMES, guidance, {"one": TARGET})
    torch.testing.assert_close(found.samples, plain.samples)
    with pytest.raises(FewstepError, match="2 targets were given for 3"):
        guided_sample(net, NOISE, None, TIMES, guidance, {"one": TARGET[:2]})


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewstepError, match="mapping from its parts' names"):
        BOTH(NOISE, TARGET)
    with pytest.raises(FewstepError, match="no part 'third'"):
        BOTH(NOISE, {**AIMS, "third": TARGET})
    with pytest.raises(FewstepError, match=r"measurement y of each sample\."):
        BOTH(NOISE, {})
    with pytest.raises(FewstepError, match="not a mapping with first, second"):
        MATRIX(NOISE, AIMS)
    with pytest.raises(FewstepError, match="joint: false"):
        DiffAugment(joint=True, cutout=0.0)(torch.zeros(1, 3, 8, 8), AIMS, torch.zeros(1, 8))


def test_sums_that_make_no_sense_are_refused() -> None:
    for parts, weights in (({}, {}), ({"a": MATRIX}, {"b": 1.0}), ({"a": MATRIX}, {"a": -1.0})):
        with pytest.raises(FewstepError, match="above 0"):
            Sum(parts, weights)  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match=r"Decoded\(Sum"):
        Sum({"a": Decoded(MATRIX, None)})  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match=r"Decoded\(EachFrame"):
        EachFrame(Decoded(MATRIX, None))  # type: ignore[arg-type]

    class Mean(Size):
        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            return super().__call__(x0, target).mean()

    with pytest.raises(FewstepError, match="part 'a' of a Sum returned losses of shape"):
        Sum({"a": Mean()})(NOISE, None)


def test_a_videos_loss_is_the_mean_of_its_frames() -> None:
    video = randn(2, 1, 3, 4, 4)
    wanted = randn(2, 1, 4, 4, seed=3)

    class Gap(Energy):
        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            assert isinstance(target, Tensor)
            return (x0 - target).square().flatten(1).sum(1)

    found = EachFrame(Gap())(video, wanted)
    each = torch.stack([Gap()(video[:, :, f], wanted) for f in range(3)])
    torch.testing.assert_close(found, each.mean(0))
    with pytest.raises(FewstepError, match="looks at videos"):
        EachFrame(Gap())(wanted, wanted)


def test_all_frames_of_a_video_get_the_same_view() -> None:
    still = randn(2, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
    uniform = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).double()
    seen, _ = DiffAugment()(still, None, uniform)
    picture, _ = DiffAugment()(still[:, :, 0], None, uniform)
    for frame in range(4):
        torch.testing.assert_close(seen[:, :, frame], picture)
    assert FinalPosition().minimum == 0.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import (
    Backbone,
    Cond,
    Denoiser,
    FlowSchedule,
    Guided,
    PredictionType,
    Schedule,
    VPSchedule,
)
from fewstep.networks import DiT, RingMixture

NULL = 3


class Toy(Backbone):
    """A nonlinear network whose rows do not mix, and which remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (2,)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.classes = nn.Parameter(torch.randn(NULL + 1, 2, generator=generator))
        self.calls: list[tuple[int, torch.dtype]] = []

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(cond["class_labels"], NULL)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        self.calls.append((len(x_t), t.dtype))
        shift = self.classes.to(x_t.dtype)[class_labels]
        angle = (x_t @ self.weight.to(x_t.dtype) + shift) * (1 + t[:, None].to(x_t.dtype) / 1000)
        return angle.sin()


class Distilled(Toy):
    """A student that has taken a guidance scale ``g`` into its weights; it negates by class 2."""

    def __init__(self, teacher: Toy, scale: float) -> None:
        super().__init__()
        self.teacher, self.scale = teacher, scale

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(cond["class_labels"], 2)}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        null = self.teacher(x_t, t, torch.full_like(class_labels, NULL))
        return null + self.scale * (self.teacher(x_t, t, class_labels) - null)


def toy(prediction_type: PredictionType = "epsilon", schedule: Schedule | None = None) -> Denoiser:
    return Denoiser(Toy(), schedule or VPSchedule(), prediction_type)


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([999.0, 500.0, 20.0, 1.0], dtype=torch.float64)
    return x_t, t, {"class_labels": torch.tensor([0, 1, 2, 0])}


TYPES = [("epsilon", VPSchedule()), ("v_prediction", VPSchedule()), ("sample", VPSchedule())]
TYPES.append(("flow_prediction", FlowSchedule()))


@pytest.mark.parametrize(("prediction_type", "schedule"), TYPES)
def test_prediction_splits_the_sample(prediction_type: PredictionType, schedule: Schedule) -> None:
    x_t, t, cond = inputs()
    prediction = toy(prediction_type, schedule)(x_t, t, cond)
    alpha, sigma = schedule.levels(t, x_t)
    split = alpha * prediction.x0 + sigma * prediction.eps
    torch.testing.assert_close(split, x_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("prediction_type", "schedule"), TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0 + 1e-9, 4.5])
def test_batched_guidance_is_two_separate_evaluations(
    prediction_type: PredictionType, schedule: Schedule, scale: float
) -> None:
    denoiser, (x_t, t, cond) = toy(prediction_type, schedule), inputs()
    conditional = denoiser(x_t, t, cond)
    unconditional = denoiser(x_t, t, denoiser.backbone.null_cond(cond))
    guided = denoiser.guided(x_t, t, cond, scale)
    for name in ("x0", "eps"):
        low, high = getattr(unconditional, name), getattr(conditional, name)
        torch.testing.assert_close(getattr(guided, name), low + scale * (high - low))
    # Guidance of predictions is guidance of the solver's outputs: the jump is affine.
    s = t / 2
    low, high = schedule.jump(unconditional, s), schedule.jump(conditional, s)
    torch.testing.assert_close(schedule.jump(guided, s), low + scale * (high - low))


def test_guidance_costs_one_batched_call_and_scale_one_a_plain_call() -> None:
    denoiser, (x_t, t, cond) = toy(), inputs()
    denoiser.guided(x_t, t, cond, 3.0)
    denoiser.guided(x_t, t, cond, 1)
    denoiser.guided(x_t, t, cond, 1.0)
    assert [size for size, _ in denoiser.backbone.calls] == [8, 4, 4]


def test_scale_one_is_the_conditional_prediction_and_zero_the_unconditional() -> None:
    denoiser, (x_t, t, cond) = toy(), inputs()
    torch.testing.assert_close(denoiser.guided(x_t, t, cond, 1.0), denoiser(x_t, t, cond))
    null = denoiser.backbone.null_cond(cond)
    assert torch.equal(denoiser.guided(x_t, t, cond, 0.0).eps, denoiser(x_t, t, null).eps)


def test_each_sample_may_have_its_own_scale() -> None:
    denoiser, (x_t, t, cond) = toy(), inputs()
    scales = torch.tensor([1.0, 2.0, 4.5, 0.0])
    together = denoiser.guided(x_t, t, cond, scales)
    for row, scale in enumerate(scales.tolist()):
        alone = denoiser.guided(x_t, t, cond, scale)
        torch.testing.assert_close(together.x0[row], alone.x0[row])
        torch.testing.assert_close(together.eps[row], alone.eps[row])


@pytest.mark.parametrize(("distilled", "sampling"), [(5.0, 1.5), (7.5, 3.0), (2.0, 0.7)])
def test_guiding_a_student_distilled_with_guidance_multiplies_the_scales(
    distilled: float, sampling: float
) -> None:
    # PCM theorem 4, with a negative prompt: the effective scale is g g' and the negative prompt is
    # diluted by the null one.
    teacher, (x_t, t, cond) = Toy(), inputs()
    student = Denoiser(Distilled(teacher, distilled), VPSchedule(), "epsilon")
    cond = {"class_labels": torch.zeros(4, dtype=torch.long)}
    guided = student.guided(x_t, t, cond, sampling).eps

    labels = (torch.full((4,), label) for label in (0, 2, NULL))
    positive, negative, null = (teacher(x_t, t, label) for label in labels)
    product = distilled * sampling
    a = (distilled - 1) / product
    expected = product * (positive - ((1 - a) * negative + a * null)) + negative
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-12)


def test_guided_is_a_denoiser_of_fixed_scale() -> None:
    denoiser, (x_t, t, cond) = toy(), inputs()
    wrapped = Guided(denoiser, 3.0)
    assert wrapped.schedule is denoiser.schedule
    assert torch.equal(wrapped(x_t, t, cond).x0, denoiser.guided(x_t, t, cond, 3.0).x0)


def test_an_unconditional_call_is_not_guided() -> None:
    network = RingMixture(VPSchedule())
    denoiser, x_t, t = Denoiser(network, VPSchedule(), "epsilon"), torch.ones(2, 2), torch.ones(2)
    assert torch.equal(denoiser.guided(x_t, t, None, 3.0).eps, denoiser(x_t, t).eps)


def test_an_unconditional_backbone_says_so_when_guided() -> None:
    with pytest.raises(NotImplementedError, match="Backbone is unconditional"):
        Backbone().null_cond({})


def test_the_alpha_floor_applies_with_and_without_guidance() -> None:
    x_t, t, cond = inputs()
    floored = Denoiser(Toy(), VPSchedule(), "epsilon", alpha_floor=0.5)
    for scale in (1.0, 3.0):
        free, held = (d.guided(x_t, t, cond, scale) for d in (toy(), floored))
        alpha = VPSchedule().alpha(t)[:, None]
        torch.testing.assert_close(held.x0, free.x0 * alpha / alpha.clamp_min(0.5))
        assert torch.equal(held.eps, free.eps)
    assert 0.068 < float(alpha.min()) < 0.5


def test_a_half_precision_backbone_is_read_in_float32_at_exact_times() -> None:
    denoiser, (x_t, t, cond) = toy().to(torch.bfloat16), inputs()
    x_t = x_t.bfloat16()
    prediction = denoiser(x_t, t, cond)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    # Neither the levels nor the network's time went through bfloat16, where 999 is 1000.
    assert denoiser.backbone.calls == [(4, torch.float32)]
    alpha, sigma = VPSchedule().levels(t, x_t)
    split = alpha * prediction.x0 + sigma * prediction.eps
    torch.testing.assert_close(split, x_t.float(), rtol=1e-5, atol=1e-5)


def test_a_denoiser_is_rebuilt_from_its_description() -> None:
    schedule = VPSchedule("squaredcos_cap_v2", trajectory_end="clean")
    network = DiT(sample_size=8, channels=1, num_layers=1, num_heads=2, head_dim=8, num_classes=3)
    denoiser = Denoiser(network, schedule, "v_prediction", alpha_floor=0.25)
    rebuilt = Denoiser.from_spec(denoiser.to_spec())
    assert rebuilt.to_spec() == denoiser.to_spec()
    assert rebuilt.prediction_type == "v_prediction"
    assert rebuilt.alpha_floor == 0.25
    assert rebuilt.sample_shape == (1, 8, 8)
    assert rebuilt.schedule.t_min == -1
    rebuilt.load_state_dict(denoiser.state_dict())


class Telling(Toy):
    """It tells variances too, which are its output times three."""

    learned_variance = True

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        output = super().forward(x_t, t, class_labels)
        return torch.cat([output, 3 * output], dim=1)


def test_variances_are_kept_apart_and_are_the_conditional_branchs() -> None:
    plain, telling = (
        Denoiser(network, VPSchedule(), "v_prediction") for network in (Toy(), Telling())
    )
    x_t, t, cond = torch.randn(3, 2), torch.full((3,), 500.0), {"class_labels": torch.arange(3)}
    for scale in (1.0, 2.5):
        found, where = telling.guided_with_variance(x_t, t, cond, scale)
        assert torch.equal(found.eps, plain.guided(x_t, t, cond, scale).eps)
        assert torch.equal(found.eps, telling.guided(x_t, t, cond, scale).eps)
        assert where is not None
        torch.testing.assert_close(where, 3 * plain.raw(x_t, t, cond))
    assert plain.guided_with_variance(x_t, t, cond, 2.5)[1] is None


def test_the_first_channels_alone_are_guided() -> None:
    denoiser = Denoiser(Toy(), VPSchedule(), "epsilon")
    x_t, t, cond = torch.randn(3, 2), torch.full((3,), 500.0), {"class_labels": torch.arange(3)}
    found = Guided(denoiser, 2.5, channels=1)(x_t, t, cond).eps
    assert torch.equal(found[:, :1], denoiser.guided(x_t, t, cond, 2.5).eps[:, :1])
    torch.testing.assert_close(found[:, 1:], denoiser(x_t, t, cond).eps[:, 1:])
    told = Guided(denoiser, 2.5, channels=1).with_variance(x_t, t, cond)[0]
    assert torch.equal(told.eps, found)

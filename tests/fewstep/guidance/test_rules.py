from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import FlowSchedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    AdamMoments,
    Capped,
    FreeDoMRms,
    Normalised,
    Polyak,
    Scheduled,
    Signal,
    StepRule,
    plan_steps,
)
from fewstep.guidance.rules import Weight, weight_at

STEPS = plan_steps(VPSchedule(), VPSchedule().spaced_times(10), DDIM())
STEP = STEPS[5]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


G, EPS, LOSS = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0.5, 1.0, 3.0]).double()


def signal(scale: float = 1.0) -> Signal:
    return Signal(scale * G, scale * LOSS, EPS)


def lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize(
    ("rule", "power"),
    [
        (Scheduled(0.3, "signal"), 1),
        (Normalised(0.3), 0),
        (Normalised(0.3, "inverse_signal", "rms"), 0),
        (FreeDoMRms(), 0),
        (Polyak(0.3, "loss"), 0),
        (Polyak(0.3, "eps_norm"), -1),
        (AdamMoments(0.3, delta=0.0), 0),
        (Capped(Scheduled(1e6), 0.1), 0),
    ],
)
def test_how_a_step_answers_to_the_scale_of_the_loss(
    rule: StepRule, power: int, scale: float
) -> None:
    one, other = rule.displacement(signal(), STEP), rule.displacement(signal(scale), STEP)
    torch.testing.assert_close(other, scale**power * one, rtol=1e-6, atol=0)
    assert lengths(one).min() > 0


def test_the_genuine_polyak_step_ends_where_a_linear_loss_reaches_its_minimum() -> None:
    move = Polyak(1.0, "loss").displacement(Signal(G, LOSS, EPS, minimum=0.25), STEP)
    torch.testing.assert_close((G * move).flatten(1).sum(1), LOSS - 0.25)


def test_the_published_polyak_step_grows_as_the_gradient_vanishes() -> None:
    move = Polyak(0.3, "eps_norm").displacement(signal(), STEP)
    torch.testing.assert_close(lengths(move), 0.3 * lengths(EPS) / lengths(G))


@pytest.mark.parametrize("rule", [Polyak(), Polyak(1, "eps_norm"), Normalised(1), FreeDoMRms()])
def test_a_vanished_gradient_gives_no_step(rule: StepRule) -> None:
    gradient = G.clone()
    gradient[1] = 0
    move = rule.displacement(Signal(gradient, LOSS, EPS), STEP)
    assert lengths(move)[1] == 0
    assert torch.equal(move[[0, 2]], rule.displacement(signal(), STEP)[[0, 2]])


def test_a_satisfied_constraint_can_be_left_alone() -> None:
    faint = Signal(1e-9 * G, LOSS, EPS)
    assert lengths(Normalised(0.3).displacement(faint, STEP)).min() > 0.29
    assert not Normalised(0.3, floor=1e-6).displacement(faint, STEP).any()


def test_normalised_steps_have_the_length_that_was_asked_for() -> None:
    torch.testing.assert_close(
        lengths(Normalised(0.3).displacement(signal(), STEP)), torch.full((3,), 0.3).double()
    )
    rms = Normalised(0.3, "signal", "rms").displacement(signal(), STEP)
    expected = torch.full((3,), 0.3 * STEP.alpha * math.sqrt(8)).double()
    torch.testing.assert_close(lengths(rms), expected)


def test_a_cap_shortens_long_steps_of_single_samples_and_leaves_short_ones() -> None:
    gradient = G * torch.tensor([1e-3, 1.0, 1e3]).double()[:, None, None]
    free = Scheduled(1.0).displacement(Signal(gradient, LOSS, EPS), STEP)
    move = Capped(Scheduled(1.0), 0.1).displacement(Signal(gradient, LOSS, EPS), STEP)
    limit = 0.1 * STEP.sigma_s * math.sqrt(8)
    assert torch.equal(move[0], free[0])
    torch.testing.assert_close(lengths(move)[1:], torch.full((2,), limit).double())
    torch.testing.assert_close(move[2] / lengths(move)[2], free[2] / lengths(free)[2])


def test_moments_are_those_of_adam_and_begin_anew_with_each_run() -> None:
    weight = torch.nn.Parameter(torch.zeros_like(G))
    adam = torch.optim.Adam([weight], lr=0.3)
    rule = AdamMoments(0.3)
    moved, run = torch.zeros_like(G), rule.start()
    for seed in range(3):
        weight.grad = randn(3, 2, 4, seed=seed)
        adam.step()
        moved = moved - run(Signal(weight.grad, LOSS, EPS), STEP)
    torch.testing.assert_close(moved, weight.detach())
    assert torch.equal(rule.start()(signal(), STEP), AdamMoments(0.3).start()(signal(), STEP))


def test_a_cap_around_moments_keeps_their_memory() -> None:
    run, inner = Capped(AdamMoments(1e-6), 0.1).start(), AdamMoments(1e-6).start()
    for scale in (1.0, -3.0):
        assert torch.equal(run(signal(scale), STEP), inner(signal(scale), STEP))


def test_weights_over_the_steps() -> None:
    kept = torch.tensor([step.ratio**2 for step in STEPS])
    increase = torch.tensor([weight_at("increase", step) for step in STEPS])
    decrease = torch.tensor([weight_at("decrease", step) for step in STEPS])
    torch.testing.assert_close(increase, kept / kept.mean())
    torch.testing.assert_close(decrease, (1 - kept) / (1 - kept).mean())
    assert weight_at("tfg_increase", STEP) == pytest.approx(STEP.increase / STEP.ratio)
    assert weight_at("tfg_constant", STEP) == pytest.approx(1 / STEP.ratio)
    assert weight_at("inverse_signal", STEP) == pytest.approx(1 / STEP.alpha)
    ancestral = plan_steps(VPSchedule(), VPSchedule().spaced_times(10), DDIM(1))[5]
    # With the DDPM posterior, the score form is (1 - a) / sqrt(a).
    expected = (1 - ancestral.ratio**2) / ancestral.ratio
    assert weight_at("score", ancestral) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weight", get_args(Weight))
def test_a_weight_that_divides_by_the_signal_is_refused_at_pure_noise(weight: Weight) -> None:
    steps = plan_steps(FlowSchedule(), FlowSchedule().spaced_times(4), DDIM())
    if weight in ("inverse_signal", "score") or weight.startswith("tfg_"):
        with pytest.raises(FewstepError, match="set the window's high below 1000"):
            weight_at(weight, steps[0])
    else:
        assert math.isfinite(weight_at(weight, steps[0]))
    assert math.isfinite(weight_at(weight, steps[1]))

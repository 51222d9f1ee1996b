"""The rule that measures its step by what classifier-free guidance adds to the prediction."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Denoiser, Guided, Prediction, VPSchedule
from fewstep.diffusion.prediction import PredictionType
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Capped,
    Energy,
    FreeDoMCfg,
    Guidance,
    NoiseOptimisation,
    Scheduled,
    Signal,
    StepRule,
    freedom,
    guided_sample,
    optimise_noise,
    plan_steps,
)

from guided import TIMES, picture_net, randn

SCALE = 3.0
NOISE, WANTED = randn(3, 3, 8, 8), randn(3, 3, 8, 8, seed=1)
COND = {"level": torch.tensor([0.5, -0.5, 1.0]).double()}


@dataclass(frozen=True)
class Distance(Energy):
    def __call__(self, x0: Tensor, target: Any) -> Tensor:
        return (x0 - target).flatten(1).norm(dim=1)


def rms(x: Tensor) -> Tensor:
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


def straight_line(denoiser: Denoiser, strength: float) -> Tensor:
    """FreeDoM's loop for Stable Diffusion with deterministic DDIM, in alpha-bars alone."""
    abar = [float(a) for a in denoiser.schedule.alpha(TIMES) ** 2]
    v_prediction = denoiser.prediction_type == "v_prediction"
    x = NOISE
    for i, (now, then) in enumerate(itertools.pairwise(abar)):
        x, t = x.detach().requires_grad_(), TIMES[i].expand(3)
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        raw = [denoiser.backbone(x, t, level) for level in (COND["level"], None)]
        cond, null = (signal * v + noise * x if v_prediction else v for v in raw)
        eps = null + SCALE * (cond - null)
        x0 = (x - noise * eps) / signal
        (g,) = torch.autograd.grad((x0 - WANTED).flatten(1).norm(dim=1).sum(), x)
        size = strength * SCALE * rms(cond - null) / rms(g)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * eps - size * g
    return x.detach()


def sampled(guidance: Guidance, denoiser: Any, **options: Any) -> Tensor:
    run = guided_sample(
        denoiser, NOISE, COND, TIMES, guidance, WANTED, largest_move=None, **options
    )
    return run.samples


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_it_is_the_loop_of_the_release(kind: PredictionType) -> None:
    denoiser = picture_net(kind)
    guidance = freedom(Distance(), 0.2, "cfg")
    found = sampled(guidance, Guided(denoiser, SCALE))
    torch.testing.assert_close(found, straight_line(denoiser, 0.2), rtol=0, atol=1e-10)
    assert (found - straight_line(denoiser, 0.0)).abs().max() > 0.01
    saved = sampled(guidance, Guided(denoiser, SCALE), checkpointing=True)
    torch.testing.assert_close(saved, found, rtol=0, atol=1e-10)


def test_the_gap_is_the_same_whatever_the_gradient_passes_through() -> None:
    t = TIMES[1].expand(3)
    both, one = (Guided(picture_net(), SCALE, detach_null=detached) for detached in (False, True))
    (prediction, gap), (_, same) = one.with_gap(NOISE, t, COND), both.with_gap(NOISE, t, COND)
    assert gap is not None
    assert same is not None
    assert not gap.requires_grad
    torch.testing.assert_close(gap, same)
    torch.testing.assert_close(prediction.x0, both(NOISE, t, COND).x0)


@pytest.mark.parametrize("part", ["state", "clean", "inner", "capped"])
def test_wherever_a_rule_stands_it_is_told_the_gap(part: str) -> None:
    rule: StepRule = FreeDoMCfg(0.1)
    guidance = {
        "state": Guidance(Distance(), rule),
        "clean": Guidance(Distance(), clean=rule),
        "inner": Guidance(Distance(), rule, inner_steps=2),
        "capped": Guidance(Distance(), Capped(rule, 0.05)),
    }[part]
    unguided = sampled(Guidance(Distance(), Scheduled(0.0)), Guided(picture_net(), SCALE))
    found = sampled(guidance, Guided(picture_net(), SCALE))
    assert Distance()(found, WANTED).mean() < Distance()(unguided, WANTED).mean()


def test_its_length_answers_to_the_gap_alone() -> None:
    step = plan_steps(VPSchedule(), VPSchedule().spaced_times(10), DDIM())[5]
    g, gap, eps = (randn(3, 2, 4, seed=seed) for seed in range(3))
    loss = torch.ones(3).double()
    move = FreeDoMCfg(0.5).displacement(Signal(7 * g, loss, eps, cfg_gap=gap), step)
    lengths = move.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, 0.5 * gap.flatten(1).norm(dim=1))
    still = FreeDoMCfg().displacement(Signal(0 * g, loss, eps, cfg_gap=gap), step)
    assert not still.any()


def test_without_classifier_free_guidance_it_is_refused() -> None:
    guidance = Guidance(Distance(), FreeDoMCfg())
    for denoiser in (picture_net(), Guided(picture_net(), 1.0)):
        with pytest.raises(FewstepError, match="a scale above 1"):
            sampled(guidance, denoiser)
    with pytest.raises(FewstepError, match="a scale above 1"):
        guided_sample(Guided(picture_net(), SCALE), NOISE, None, TIMES, guidance, WANTED)
    search = NoiseOptimisation(Distance(), FreeDoMCfg(), iterations=1)
    with pytest.raises(FewstepError, match="a scale above 1"):
        optimise_noise(Guided(picture_net(), SCALE), NOISE, COND, TIMES, search, WANTED)


def test_other_rules_ask_for_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> tuple[Prediction, Tensor]:
        raise AssertionError("a gap that nobody asked for")

    monkeypatch.setattr(Guided, "with_gap", never)
    sampled(Guidance(Distance(), Capped(Scheduled(0.1), 0.1)), Guided(picture_net(), SCALE))
    with pytest.raises(AssertionError, match="nobody asked"):
        sampled(Guidance(Distance(), Capped(FreeDoMCfg(), 0.1)), Guided(picture_net(), SCALE))

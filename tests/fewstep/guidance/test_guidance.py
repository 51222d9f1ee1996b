from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from fewstep.diffusion import AnalyticDenoiser, FlowSchedule, VPSchedule, ode_sample
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Capped,
    DiffAugment,
    Downsample,
    EachFrame,
    Guidance,
    LinearMeasurement,
    Matrix,
    MixtureLikelihood,
    NoiseOptimisation,
    Polyak,
    Recurrence,
    Scheduled,
    Smoothing,
    Sum,
    Window,
    guided_sample,
    optimise_noise,
    plan_steps,
)
from fewstep.guidance.rules import Weight
from fewstep.networks import ring

from guided import MATRIX, NOISE, TARGET, TIMES


def test_windows_say_which_steps_are_guided_and_the_trace_counts_the_work(net: Any) -> None:
    guidance = Guidance(
        MATRIX,
        Scheduled(0.1),
        Scheduled(0.1),
        clean_iterations=3,
        window=Window(199, 999, every=2),
        smoothing=Smoothing(0.1, copies=5),
        recurrence=Recurrence(2, Window(300, 500)),
    )
    run = guided_sample(net, NOISE, None, TIMES, guidance, TARGET)
    assert run.trace.times == (999.0, 399.0, 399.0)
    assert run.trace.costs.denoiser_evaluations == 5
    assert run.trace.costs.denoiser_gradients == 3
    assert run.trace.costs.energy_evaluations == 3 * (1 + 3) * 5


def test_a_window_ends_with_its_high_and_begins_above_its_low(net: Any) -> None:
    steps = plan_steps(net.schedule, TIMES, DDIM())
    for window, times in (
        (Window(399, 999), [999.0, 699.0]),
        (Window(398, 998), [699.0, 399.0]),
        (Window(every=3), [999.0, 199.0]),
        (Window(high=399), [399.0, 199.0]),
    ):
        assert [step.t for step in steps if window.holds(step)] == times


def test_inner_steps_move_the_state_before_the_step_is_taken(net: Any) -> None:
    x, times = NOISE, TIMES[1:3]
    alpha = float(net.schedule.alpha(times[:1]))
    t = times[:1].expand(3)
    for _ in range(2):
        leaf = x.detach().requires_grad_()
        loss = MATRIX(net(leaf, t).x0, TARGET)
        x = x - 0.3 * alpha * torch.autograd.grad(loss.sum(), leaf)[0]
    expected = ode_sample(net, x, None, times)
    guidance = Guidance(MATRIX, Scheduled(0.3, "signal"), inner_steps=2)
    run = guided_sample(net, NOISE, None, times, guidance, TARGET)
    torch.testing.assert_close(run.samples, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(run.trace.displacement[0], (x - NOISE).square().mean(1).sqrt())
    assert run.trace.costs.denoiser_evaluations == 3


def test_guidance_that_moves_nothing_on_its_way_is_refused(net: Any) -> None:
    guidance = Guidance(MATRIX, Scheduled(9.0), window=Window(5000, 6000))
    with pytest.raises(FewstepError, match="times 999, 699, 399, 199 is in its window"):
        guided_sample(net, NOISE, None, TIMES, guidance, TARGET)
    last = Guidance(MATRIX, Capped(Scheduled(9.0)), window=Window(high=199))
    with pytest.raises(FewstepError, match="no length at each of the guided times 199"):
        guided_sample(net, NOISE, None, TIMES, last, TARGET)
    guided_sample(net, NOISE, None, TIMES, replace(last, window=Window(high=399)), TARGET)


@pytest.mark.parametrize("weight", ["signal", "increase"])
@pytest.mark.parametrize("inner_steps", [0, 2])
def test_a_share_of_the_signal_is_refused_where_a_flow_has_none(
    weight: Weight, inner_steps: int
) -> None:
    denoiser = AnalyticDenoiser(ring(5), FlowSchedule())
    times, noise = torch.tensor([1000.0, 0.0]).double(), NOISE[:, :2]
    energy = LinearMeasurement(Matrix(torch.tensor([[0.6, -0.8]]).double()))
    guidance = Guidance(energy, Scheduled(5.0, weight), inner_steps=inner_steps)
    with pytest.raises(FewstepError, match="a flow model has none at pure noise"):
        guided_sample(denoiser, noise, None, times, guidance, noise[:, :1])
    optimisation = NoiseOptimisation(energy, Scheduled(5.0, weight), iterations=1)
    with pytest.raises(FewstepError, match="gives noise a step of no length"):
        optimise_noise(denoiser, noise, None, times, optimisation, noise[:, :1])
    steady = replace(guidance, state=Scheduled(5.0))
    found = guided_sample(denoiser, noise, None, times, steady, noise[:, :1])
    assert found.trace.displacement.min() > 0


def test_a_step_to_the_minimum_needs_one() -> None:
    times, noise = TIMES, NOISE[:, :2]
    denoiser = AnalyticDenoiser(ring(5), VPSchedule(trajectory_end="clean"))
    labels = torch.zeros(3).long()
    for minimum in (None, -5.0):
        energy = MixtureLikelihood(denoiser.mixture, "density", minimum)
        for whole in (energy, Sum({"one": energy}), EachFrame(energy)):
            assert whole.minimum == minimum
        guidance = Guidance(energy, Capped(Polyak(gap="loss")))
        if minimum is None:
            with pytest.raises(FewstepError, match="needs the loss's lower bound"):
                guided_sample(denoiser, noise, None, times, guidance, labels)
        else:
            found = guided_sample(denoiser, noise, None, times, guidance, labels)
            assert found.trace.displacement[:-1].min() > 0


def test_guidance_is_built_from_an_experiment_file() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--guidance", type=Guidance)
    place = "fewstep.guidance"
    given = {
        "energy": {
            "class_path": f"{place}.LinearMeasurement",
            "init_args": {
                "operator": {"class_path": f"{place}.Downsample", "init_args": {"factor": 4}}
            },
        },
        "state": {
            "class_path": f"{place}.Capped",
            "init_args": {
                "rule": {"class_path": f"{place}.Polyak", "init_args": {"gap": "eps_norm"}}
            },
        },
        "augmentor": {"class_path": f"{place}.DiffAugment", "init_args": {"copies": 20}},
        "recurrence": {"count": 10, "window": {"low": 300, "high": 800}},
    }
    built = parser.instantiate(parser.parse_object({"guidance": given})).guidance
    assert built == Guidance(
        LinearMeasurement(Downsample(4)),
        Capped(Polyak(gap="eps_norm")),
        augmentor=DiffAugment(20),
        recurrence=Recurrence(10, Window(300, 800)),
    )


def test_options_that_make_no_sense_are_refused(net: Any) -> None:
    with pytest.raises(FewstepError, match="without a step rule"):
        Guidance(MATRIX)
    with pytest.raises(FewstepError, match="clean_iterations"):
        Guidance(MATRIX, clean=Scheduled(1.0), clean_iterations=0)
    with pytest.raises(FewstepError, match="inner_steps: 2"):
        Guidance(MATRIX, clean=Scheduled(1.0), inner_steps=2)
    with pytest.raises(FewstepError, match="low must be below high"):
        Window(500, 300)
    with pytest.raises(FewstepError, match="count: 0"):
        Recurrence(0)
    with pytest.raises(FewstepError, match="2 targets were given for 3 samples"):
        guided_sample(net, NOISE, None, TIMES, Guidance(MATRIX, Scheduled(0.1)), TARGET[:2])

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    AnalyticDenoiser,
    Cond,
    DenoiserLike,
    FlowSchedule,
    PhaseSchedule,
    Prediction,
    Schedule,
    TimeGrid,
    VPSchedule,
    consistency_sample,
    one_step_sample,
    phased_sample,
)
from fewstep.errors import FewstepError
from fewstep.guidance import (
    Capped,
    FreeDoMRms,
    Guidance,
    LinearMeasurement,
    Matrix,
    Normalised,
    Polyak,
    Scheduled,
    StepRule,
    consistency_steps,
    guided_sample,
    one_step_times,
    phased_steps,
    plain_sample,
)
from fewstep.networks import ring

from guided import randn

MIXTURE = ring(5)
ENERGY = LinearMeasurement(Matrix(torch.tensor([[0.6, -0.8]]).double()))
NOISE, TARGET = randn(6, 2), randn(6, 1, seed=1)
NONE = Guidance(ENERGY, Scheduled(0.0))
SCHEDULES = [
    VPSchedule(),
    VPSchedule(trajectory_end="clean"),
    VPSchedule(rescale_betas_zero_snr=True),
    FlowSchedule(3.0),
    FlowSchedule(trajectory_end="first_index"),
]


class Jumper:
    """A student that jumps to clean data and, unlike posterior means, hears its noise at any time:
    even where there is no signal."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        alpha, sigma = self.schedule.levels(t, x_t)
        x0 = torch.tanh(x_t / torch.hypot(alpha, sigma) + t[:, None] / 2000)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_consistency_walk_is_consistency_sampling_wherever_trajectories_end(
    schedule: Schedule,
) -> None:
    times, base = schedule.spaced_times(4), consistency_steps(schedule)
    student = Jumper(schedule)
    expected = consistency_sample(student, NOISE, None, times, draws())
    walk = guided_sample(student, NOISE, None, times, NONE, TARGET, draws(), base)
    plain = plain_sample(student, NOISE, None, times, draws(), base)
    torch.testing.assert_close(walk.samples, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(plain.samples, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.4, 1.0])
def test_the_phased_walk_is_the_chain_of_edges(schedule: Schedule, stochasticity: float) -> None:
    times = PhaseSchedule(TimeGrid.uniform(schedule, 20), 4).sampling_times(4)
    base, student = phased_steps(schedule, stochasticity), Jumper(schedule)
    expected = phased_sample(student, NOISE, None, times, draws(), stochasticity)
    walk = guided_sample(student, NOISE, None, times, NONE, TARGET, draws(), base)
    torch.testing.assert_close(walk.samples, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_from_pure_noise_is_the_one_step_sampler(schedule: Schedule) -> None:
    student, times = Jumper(schedule), one_step_times(schedule)
    plain = plain_sample(student, NOISE, None, times)
    torch.testing.assert_close(plain.samples, one_step_sample(student, NOISE), rtol=0, atol=1e-7)
    costs = plain.trace.costs
    assert (costs.denoiser_evaluations, costs.denoiser_gradients) == (1, 0)
    assert costs.energy_evaluations == 0
    assert costs.seconds > 0


RULES = [
    Scheduled(0.05),
    Scheduled(0.05, "decrease"),
    Normalised(0.05),
    Polyak(0.2),
    Capped(Polyak(0.2), 0.2),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_students_are_guided_at_pure_noise_where_there_is_no_signal(
    schedule: Schedule, rule: StepRule
) -> None:
    student, times = Jumper(schedule), one_step_times(schedule)
    guidance = Guidance(ENERGY, rule, inner_steps=4)
    guided = guided_sample(student, NOISE, None, times, guidance, TARGET)
    before = ENERGY(one_step_sample(student, NOISE), TARGET)
    after = ENERGY(guided.samples, TARGET)
    assert after.mean() < 0.9 * before.mean()
    assert guided.samples.isfinite().all()
    assert guided.trace.costs.denoiser_gradients == 4
    assert guided.trace.costs.denoiser_evaluations == 5


@pytest.mark.parametrize("rule", [Scheduled(1.0, "score"), FreeDoMRms()])
@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()])
def test_rules_that_are_a_share_of_the_steps_length_are_refused_in_place(
    schedule: Schedule, rule: StepRule
) -> None:
    guidance = Guidance(ENERGY, rule, inner_steps=2)
    with pytest.raises(FewstepError, match=r"inner steps .* stay in place"):
        guided_sample(Jumper(schedule), NOISE, None, one_step_times(schedule), guidance, TARGET)


def test_the_score_form_says_what_to_do_at_pure_noise_without_signal() -> None:
    schedule, guidance = FlowSchedule(), Guidance(ENERGY, Scheduled(1.0, "score"))
    student = AnalyticDenoiser(MIXTURE, schedule)
    with pytest.raises(FewstepError, match="inner_steps, or optimise the initial noise"):
        guided_sample(student, NOISE, None, schedule.spaced_times(1), guidance, TARGET)


@pytest.mark.parametrize("options", [{"state": Capped(Polyak())}, {"clean": Capped(Polyak())}])
def test_a_capped_rule_that_could_never_move_anything_is_refused(options: Any) -> None:
    schedule = FlowSchedule()
    student: DenoiserLike = Jumper(schedule)
    guidance = Guidance(ENERGY, **options)
    with pytest.raises(FewstepError, match="set inner_steps: 1 or more"):
        guided_sample(student, NOISE, None, one_step_times(schedule), guidance, TARGET)
    run = guided_sample(student, NOISE, None, schedule.spaced_times(2), guidance, TARGET)
    assert run.trace.displacement[0].min() > 0


@pytest.mark.parametrize("stochasticity", [-0.1, 1.1])
def test_a_stochasticity_that_is_no_share_is_refused(stochasticity: float) -> None:
    with pytest.raises(FewstepError, match="a share between 0 and 1"):
        phased_steps(FlowSchedule(), stochasticity)

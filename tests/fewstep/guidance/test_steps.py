from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from fewstep.diffusion import (
    AnalyticDenoiser,
    Backbone,
    Cond,
    Denoiser,
    FlowSchedule,
    Prediction,
    PredictionType,
    Schedule,
    VPSchedule,
    consistency_sample,
    network_target,
    ode_sample,
)
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    BaseStep,
    Capped,
    Energy,
    FixedShare,
    FreeDoMRms,
    Guidance,
    LinearMeasurement,
    Matrix,
    Polyak,
    Recurrence,
    Scheduled,
    StepRule,
    guided_sample,
    plain_sample,
    plan_steps,
)
from fewstep.networks import ring

VP = VPSchedule(trajectory_end="clean")
FLOW = FlowSchedule()
MIXTURE = ring(5)
TIMES = torch.tensor([899.0, 599.0, 299.0, -1.0]).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


DIRECTION = torch.tensor([[0.6, -0.8]]).double()
ENERGY = LinearMeasurement(Matrix(DIRECTION))
NOISE, TARGET = randn(6, 2), randn(6, 1, seed=1)


class Linear(Energy):
    """A loss whose gradient is the same everywhere."""

    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        return (x0 @ DIRECTION.T)[:, 0]


class Told(Backbone):
    """Outputs, in any prediction type, what the exact denoiser says."""

    config: dict[str, Any]

    def __init__(self, prediction_type: PredictionType) -> None:
        super().__init__()
        self.prediction_type = prediction_type

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        prediction = AnalyticDenoiser(MIXTURE, VP)(x_t, t)
        levels = VP.levels(t, x_t)
        return network_target(prediction.x0, prediction.eps, *levels, self.prediction_type)


RULES = [
    Scheduled(0.3, "score"),
    Scheduled(0.3, "tfg_increase"),
    FreeDoMRms(3.0),
    Polyak(0.1, "loss"),
    Capped(Polyak(0.1, "eps_norm"), 0.1),
]


class Exploding(VPSchedule):
    """The same noise for each signal, with the signal left at its size."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(super().alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t) / super().alpha(t)


VE = Exploding(trajectory_end="clean")
EYE = torch.eye(2).double()


class Correlated:
    """The exact denoiser of a mixture of Gaussians with full covariances."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.means, roots = randn(3, 2, seed=4), randn(3, 2, 2, seed=5) / 2
        self.covariances = roots @ roots.mT + 0.01 * EYE
        self.weights = torch.tensor([0.5, 0.3, 0.2]).double()

    def noisy(self, alpha: Tensor | float, sigma: Tensor | float) -> MultivariateNormal:
        total = alpha**2 * self.covariances + sigma**2 * EYE
        return MultivariateNormal(alpha * self.means, total)

    def log_density(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Of each component with its weight, ``(B, K)``."""
        by_component = self.noisy(alpha, sigma).log_prob(x[:, None])
        found: Tensor = by_component + self.weights.log()
        return found

    def posterior(
        self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Mean ``(B, 2)`` and covariance ``(B, 2, 2)`` of clean data."""
        share = self.log_density(x, alpha, sigma).softmax(1)
        total = self.noisy(alpha, sigma).covariance_matrix
        gain = alpha * self.covariances @ torch.linalg.inv(total)
        centre = self.means + torch.einsum("kij,bkj->bki", gain, x[:, None] - alpha * self.means)
        spread = self.covariances - alpha * gain @ self.covariances
        mean = torch.einsum("bk,bki->bi", share, centre)
        away = centre - mean[:, None]
        between = torch.einsum("bk,bki,bkj->bij", share, away, away)
        return mean, between + torch.einsum("bk,kij->bij", share, spread)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        alpha, sigma = self.schedule.alpha(t[:1]), self.schedule.sigma(t[:1])
        x0, _ = self.posterior(x_t, alpha, sigma)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


@pytest.mark.parametrize("schedule", [VP, VE, FLOW])
def test_the_clean_estimate_is_tweedies(schedule: Schedule) -> None:
    denoiser, t = Correlated(schedule), torch.full((6,), 599.0).double()
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    x = NOISE.clone().requires_grad_()
    (score,) = torch.autograd.grad(denoiser.log_density(x, alpha, sigma).logsumexp(1).sum(), x)
    expected = (NOISE + sigma**2 * score) / alpha
    torch.testing.assert_close(denoiser(NOISE, t).x0, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", [VP, VE, FLOW])
def test_the_clean_estimate_moves_with_the_state_as_the_posterior_covariance_says(
    schedule: Schedule,
) -> None:
    # d x0 / d x_t = alpha / sigma^2 Cov[x0 | x_t]. Guidance acts in variance-preserving
    # coordinates, of which the state is ``scale`` times.
    times = torch.tensor([599.0, 299.0]).double()
    (step,) = plan_steps(schedule, times, DDIM())
    denoiser = Correlated(schedule)
    guided = guided_sample(denoiser, NOISE, None, times, Guidance(Linear(), Scheduled(1.0)))
    shift = ode_sample(denoiser, NOISE, None, times) - guided.samples
    alpha, sigma = (float(level(times[:1])) for level in (schedule.alpha, schedule.sigma))
    _, covariance = denoiser.posterior(NOISE, alpha, sigma)
    expected = step.scale_s * step.scale * alpha / sigma**2 * covariance @ DIRECTION[0]
    torch.testing.assert_close(shift, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_other_paths_take_the_guided_steps_of_the_variance_preserving_one(
    rule: StepRule, eta: float
) -> None:
    alpha, sigma = VP.alpha(TIMES), VP.sigma(TIMES)
    flow_times = 1000 * sigma / (alpha + sigma)
    guidance = Guidance(ENERGY, rule, Scheduled(0.1), recurrence=Recurrence(2))
    samples = []
    for schedule, times in ((VP, TIMES), (VE, TIMES), (FLOW, flow_times)):
        start = torch.hypot(schedule.alpha(times[:1]), schedule.sigma(times[:1]))
        run = guided_sample(
            Correlated(schedule),
            start * NOISE,
            None,
            times,
            guidance,
            TARGET,
            torch.Generator().manual_seed(3),
            DDIM(eta),
        )
        samples.append(run.samples)
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=0, atol=1e-8)
    unguided = ode_sample(Correlated(VP), NOISE, None, TIMES)
    assert (samples[0] - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow_prediction"])
def test_what_a_network_predicts_makes_no_difference(prediction_type: PredictionType) -> None:
    guidance = Guidance(ENERGY, Scheduled(0.3, "score"), Scheduled(0.1))
    one, other = (
        guided_sample(Denoiser(Told(kind), VP, kind), NOISE, None, TIMES, guidance, TARGET)
        for kind in ("epsilon", prediction_type)
    )
    torch.testing.assert_close(one.samples, other.samples, rtol=0, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [VPSchedule(), VP, FlowSchedule(3.0)])
def test_without_strength_a_walk_is_to_the_bit_what_it_is_without_guidance(
    schedule: Schedule, eta: float
) -> None:
    times, none = schedule.spaced_times(6), Guidance(ENERGY, Scheduled(0.0), Scheduled(0.0))
    denoiser, base = Correlated(schedule), DDIM(eta)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    walk = guided_sample(denoiser, NOISE, None, times, none, TARGET, one, base)
    plain = plain_sample(denoiser, NOISE, None, times, other, base)
    assert torch.equal(walk.samples, plain.samples)


@pytest.mark.parametrize("schedule", [VPSchedule(), VP, FlowSchedule(3.0)])
def test_without_strength_a_guided_walk_is_the_sampler_it_is_built_on(
    schedule: VPSchedule | FlowSchedule,
) -> None:
    denoiser, times = AnalyticDenoiser(MIXTURE, schedule), schedule.spaced_times(6)
    none = Guidance(ENERGY, Scheduled(0.0), Scheduled(0.0))
    euler = guided_sample(denoiser, NOISE, None, times, none, TARGET).samples
    expected = ode_sample(denoiser, NOISE, None, times)
    torch.testing.assert_close(euler, expected, rtol=0, atol=1e-10)


def test_with_a_share_of_one_the_walk_is_multistep_consistency_sampling() -> None:
    denoiser = AnalyticDenoiser(MIXTURE, VP)
    none = Guidance(ENERGY, Scheduled(0.0))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    walk = guided_sample(denoiser, NOISE, None, TIMES, none, TARGET, generators[0], FixedShare(1.0))
    expected = consistency_sample(denoiser, NOISE, None, TIMES, generators[1])
    torch.testing.assert_close(walk.samples, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("base", "share"), [(DDIM(1), None), (FixedShare(0.5), 0.5)])
def test_the_levels_of_a_step(base: BaseStep, share: float | None) -> None:
    for step in plan_steps(VP, TIMES, base):
        assert step.kept_std**2 + step.noise_std**2 == pytest.approx(step.sigma_s**2)
        if share is not None:
            assert step.noise_std == pytest.approx(share * step.sigma_s)
            continue
        # The DDPM posterior: weights c1 of x0 and c2 of x_t, standard deviation c3.
        x0, eps, now, then, a = 1.7, -0.4, step.alpha**2, step.alpha_s**2, step.ratio**2
        c1 = then**0.5 * (1 - a) / (1 - now)
        c2 = a**0.5 * (1 - then) / (1 - now)
        arrived = step.arrive(torch.tensor(x0).double(), torch.tensor(eps).double(), None)
        x_t = step.alpha * x0 + step.sigma * eps
        assert float(arrived) == pytest.approx(c1 * x0 + c2 * x_t)
        assert step.noise_std == pytest.approx(((1 - then) * (1 - a) / (1 - now)) ** 0.5)


def test_time_travel_keeps_the_marginal() -> None:
    (step,) = plan_steps(VP, torch.tensor([599.0, 299.0]).double(), DDIM())
    clean, _ = MIXTURE.sample(100_000, torch.Generator().manual_seed(0))
    clean = clean.double()
    then = step.alpha_s * clean + step.sigma_s * randn(100_000, 2, seed=1)
    back = step.go_back(then, randn(100_000, 2, seed=2))
    variance = step.alpha**2 * clean.T.cov() + step.sigma**2 * EYE
    torch.testing.assert_close(back.mean(0), step.alpha * clean.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(back.T.cov(), variance, rtol=0, atol=0.02)


@pytest.mark.parametrize("times", [[500.0], [100.0, 500.0], [500.0, 500.0]])
def test_times_that_do_not_descend_are_refused(times: list[float]) -> None:
    with pytest.raises(FewstepError, match="each below the one before"):
        plan_steps(VP, torch.tensor(times), DDIM())

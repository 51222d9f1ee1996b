"""PCM against exact fixed points, limiting cases and the analytic teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.diffusion import (
    AnalyticDenoiser,
    Backbone,
    Denoiser,
    GaussianMixture,
    PhaseSchedule,
    TimeGrid,
    VPSchedule,
    consistency_sample,
    ode_sample,
    phased_sample,
)
from fewstep.errors import FewstepError
from fewstep.networks import RingMixture
from fewstep.seeding import torch_generator
from lightning_modules import PhasedConsistencyDistillation
from lightning_modules.chains import chain_of

from rings import distil

Make = Callable[[], Denoiser]
MEAN, STD = 1.3, 0.6


# ---------------------------------------------------------------------- the exact fixed point


class TabularAffine(Backbone):
    """``eps = a_i x + b_i`` with two numbers a grid time, initialised as the exact teacher."""

    def __init__(self, schedule: VPSchedule, grid: TimeGrid) -> None:
        super().__init__()
        self.config = {}
        self.sample_shape = (1,)
        self.times = grid.times.home
        alpha, sigma = schedule.alpha(self.times), schedule.sigma(self.times)
        variance = (alpha * STD).square() + sigma.square()
        self.slope = nn.Parameter(sigma / variance)
        self.offset = nn.Parameter(-sigma * alpha * MEAN / variance)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        index = torch.searchsorted(self.times, t.clamp_min(self.times[0]).double())
        return self.slope[index, None] * x_t + self.offset[index, None]


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fixed_point(schedule: VPSchedule, phases: PhaseSchedule) -> tuple[Tensor, Tensor]:
    """Slope and offset of the jump ``t_i -> edge`` composed of the teacher's grid steps."""
    times, previous = phases.grid.times.home, phases.grid.previous.home
    slopes, offsets = [], []
    for index in range(len(times)):
        slope, offset = torch.ones(()), torch.zeros(())
        step = index
        while True:
            alpha, sigma = schedule.alpha(times[step]), schedule.sigma(times[step])
            alpha_p, sigma_p = schedule.alpha(previous[step]), schedule.sigma(previous[step])
            variance = (alpha * STD) ** 2 + sigma**2
            a, b = sigma / variance, -sigma * alpha * MEAN / variance
            step_slope = alpha_p / alpha + (sigma_p - alpha_p * sigma / alpha) * a
            step_offset = (sigma_p - alpha_p * sigma / alpha) * b
            slope, offset = step_slope * slope, step_slope * offset + step_offset
            if previous[step] == phases.edge_of.home[index]:
                break
            step -= 1
        slopes.append(slope)
        offsets.append(offset)
    return torch.stack(slopes), torch.stack(offsets)


def distil_tabular(num_phases: int, shift_edge: bool = False) -> float:
    """Largest coefficient error of a trained tabular student against the fixed point."""
    schedule = VPSchedule()
    grid = TimeGrid.uniform(schedule, 40)
    module = PhasedConsistencyDistillation(
        lambda: Denoiser(TabularAffine(schedule, grid), schedule, "epsilon"),
        num_phases=num_phases,
        num_grid_points=40,
        loss="l2",
        ema_decay=None,
    )
    module.configure_model()
    if shift_edge:
        first = 40 // num_phases
        module.phases.edge_of.home[first : 2 * first] = grid.times.home[first]
        module.phases.edge_of.home[first] = grid.times.home[first - 1]
    optimizer = torch.optim.Adam(module.student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for update in range(2000):
        generator = torch_generator(0, "train", update)
        x0 = MEAN + STD * torch.randn(1024, 1, generator=generator)
        batch: Batch = {"sample": x0, "cond": {}, "key": []}
        (step,) = list(module.updates(batch, module.draw(batch, generator)))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        decay.step()
    expected = fixed_point(schedule, PhaseSchedule(grid, num_phases))
    x = torch.tensor([[0.0], [1.0]])
    worst = 0.0
    with torch.no_grad():
        for index, t in enumerate(grid.times.home):
            s = PhaseSchedule(grid, num_phases).edge_of.home[index]
            at_zero, at_one = module.consistency(
                module.student, x, t.expand(2), s.expand(2), {}
            ).flatten()
            worst = max(worst, float((at_zero - expected[1][index]).abs()))
            worst = max(worst, float((at_one - at_zero - expected[0][index]).abs()))
    return worst


@pytest.mark.parametrize("num_phases", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_tabular_student_reaches_the_composition_of_the_teachers_steps(
    num_phases: int, float64: None
) -> None:
    assert distil_tabular(num_phases) < 1e-5


@pytest.mark.slow
def test_one_edge_moved_by_one_grid_step_is_seen(float64: None) -> None:
    assert distil_tabular(8, shift_edge=True) > 1e-3


# ---------------------------------------------------------------------- limiting cases


def test_as_many_phases_as_grid_points_give_a_loss_of_exactly_zero(
    teacher: Make, digit_batch: Batch
) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=40, num_grid_points=40)
    module.configure_model()
    for number in range(5):
        draws = module.draw(digit_batch, torch_generator(0, "draws", number))
        (update,) = list(module.updates(digit_batch, draws))
        assert float(update.loss) == 0


def test_with_guidance_and_as_many_phases_as_points_the_target_is_the_guided_step(
    teacher: Make, digit_batch: Batch
) -> None:
    module = PhasedConsistencyDistillation(
        teacher, num_phases=40, num_grid_points=40, guidance_range=(3.0, 3.0)
    )
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    pair = module.pair(digit_batch, draws)
    t = module.phases.grid.times.home[draws.index]
    x_t = module.schedule.add_noise(digit_batch["sample"], draws.noise, t)
    guided = module.teacher.guided(x_t, t, digit_batch["cond"], 3.0)
    previous = module.phases.grid.previous.home[draws.index]
    torch.testing.assert_close(pair.target, module.schedule.jump(guided, previous))


def test_substeps_of_a_coarse_grid_are_the_steps_of_the_fine_one(
    teacher: Make, digit_batch: Batch
) -> None:
    module = PhasedConsistencyDistillation(
        teacher, num_phases=20, num_grid_points=20, solver_substeps=2
    )
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    pair = module.pair(digit_batch, draws)
    t = module.phases.grid.times.home[draws.index]
    middle, end = t - 25, (t - 50).clamp_min(0)
    x_t = module.schedule.add_noise(digit_batch["sample"], draws.noise, t)
    with torch.no_grad():
        half = module.schedule.jump(module.teacher(x_t, t, digit_batch["cond"]), middle)
        whole = module.schedule.jump(module.teacher(half, middle, digit_batch["cond"]), end)
    torch.testing.assert_close(pair.target, whole)
    assert module.evaluations()["teacher"].forward == 2


def test_the_velocity_weighting_compares_mean_velocities(teacher: Make, digit_batch: Batch) -> None:
    """For a v-prediction student and target at the same point, the jump's error over its length is
    the error of the predicted velocity."""
    module = PhasedConsistencyDistillation(
        teacher, num_phases=4, num_grid_points=40, loss="l2", weighting="velocity"
    )
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    pair = module.pair(digit_batch, draws)
    t, s = pair.t, pair.s
    x_t = module.schedule.add_noise(digit_batch["sample"], draws.noise, t)
    velocity = module.student.raw(x_t, t, digit_batch["cond"])
    shifted = module.student.interpret(velocity + 0.3, x_t, t)
    moved = pair._replace(student=module.schedule.jump(module.student(x_t, t, pair.cond), s))
    moved = moved._replace(target=module.schedule.jump(shifted, s))
    assert float(module.consistency_loss(moved)) == pytest.approx(0.09, rel=1e-4)


def test_favoured_edges_are_the_upper_ends_of_phases(teacher: Make, digit_batch: Batch) -> None:
    module = PhasedConsistencyDistillation(
        teacher, num_phases=4, num_grid_points=40, edge_share=0.5
    )
    module.configure_model()
    batch: Batch = {**digit_batch, "sample": torch.zeros(8000, 1, 1, 1)}
    index = module.draw(batch, torch_generator(0, "draws")).index
    counts = torch.bincount(index, minlength=40) / 8000
    upper = torch.tensor([9, 19, 29, 39])
    torch.testing.assert_close(counts[upper], torch.full((4,), 0.1375), atol=0.015, rtol=0)
    rest = torch.ones(40, dtype=torch.bool)
    rest[upper] = False
    torch.testing.assert_close(counts[rest], torch.full((36,), 0.0125), atol=0.006, rtol=0)


def test_an_untrained_student_samples_as_the_teachers_ddim_at_the_same_times(
    teacher: Make,
) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=4, num_grid_points=40)
    module.configure_model()
    noise, cond = torch.randn(3, 1, 8, 8), {"class_labels": torch.arange(3)}
    times = torch.tensor([999.0, 749, 499, 249, 0])
    expected = ode_sample(module.teacher, noise, cond, times)
    torch.testing.assert_close(module.sample(noise, cond, 4), expected)


# ---------------------------------------------------------------------- step counts and edges


def test_step_counts_the_phases_do_not_serve_are_refused_with_advice(teacher: Make) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=4, num_grid_points=40)
    module.configure_model()
    noise, cond = torch.randn(1, 1, 8, 8), {"class_labels": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(FewstepError, match="has 4 phases and serves 4 sampling steps, not 3"):
        module.sample(noise, cond, 3)
    module.allow_untrained_steps = True
    assert module.sample(noise, cond, 2).shape == noise.shape
    with pytest.raises(FewstepError):
        module.sample(noise, cond, 5)
    assert module.step_counts() == [4]


@pytest.mark.parametrize("stochasticity", [0.0, 0.5])
def test_one_phase_is_sampled_in_several_steps_as_a_consistency_model(
    teacher: Make, stochasticity: float
) -> None:
    options: dict[str, Any] = {"num_grid_points": 40, "stochasticity": stochasticity}
    module = PhasedConsistencyDistillation(teacher, num_phases=1, **options)
    module.configure_model()
    noise, cond = torch.randn(3, 1, 8, 8), {"class_labels": torch.arange(3)}
    times = torch.tensor([999.0, 749, 499, 249, 0])
    expected = consistency_sample(module.student, noise, cond, times, torch_generator(0, "renoise"))
    sampled = module.sample(noise, cond, 4, torch_generator(0, "renoise"))
    torch.testing.assert_close(sampled, expected)
    once = ode_sample(module.student, noise, cond, times[[0, -1]])
    torch.testing.assert_close(module.sample(noise, cond, 1), once)
    assert module.step_counts() == [1]
    with pytest.raises(FewstepError, match="serves 1 to 40 steps, not 41"):
        module.sample(noise, cond, 41)


@pytest.mark.parametrize(("num_phases", "num_steps"), [(1, 1), (1, 4), (4, 4)])
def test_a_checkpoints_record_is_sampled_as_its_run(
    teacher: Make, num_phases: int, num_steps: int
) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=num_phases, num_grid_points=40)
    module.configure_model()
    record = {"method": "PhasedConsistencyDistillation", **module.method_metadata()}
    chain = chain_of(record, module.schedule, num_steps)
    assert chain.renoise == (num_phases == 1 and num_steps > 1)
    noise, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.arange(2)}
    sampled = module.sample(noise, cond, num_steps, torch_generator(0, "renoise"))
    again = chain.sample(module.student, noise, cond, torch_generator(0, "renoise"))
    assert torch.equal(sampled, again)


def test_checkpoints_record_the_edges(teacher: Make) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=8, num_grid_points=50)
    module.configure_model()
    stored = module.method_metadata()["phases"]
    assert stored["edges"][1:] == [119, 239, 359, 499, 619, 739, 859, 999]
    assert PhaseSchedule.from_config(stored).edges.home.tolist() == stored["edges"]


# ---------------------------------------------------------------------- the adversarial term


def adversarial(teacher: Make, **options: Any) -> PhasedConsistencyDistillation:
    module = PhasedConsistencyDistillation(
        teacher, num_phases=2, num_grid_points=40, adversarial_weight=0.1, **options
    )
    module.configure_model()
    return module


def test_heads_that_say_zero_give_the_chance_levels_two_and_one(
    teacher: Make, digit_batch: Batch
) -> None:
    module = adversarial(teacher)
    for parameter in module.discriminator.parameters():
        nn.init.zeros_(parameter)
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    student, discriminator = list(module.updates(digit_batch, draws))
    assert float(discriminator.loss) == 2
    assert float(student.logs["adversarial"]) == 1
    assert float(student.loss) == pytest.approx(float(student.logs["consistency"]) + 0.1)


def test_each_loss_trains_its_role_and_the_discriminators_reaches_no_other(
    teacher: Make, digit_batch: Batch
) -> None:
    module = adversarial(teacher)
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    student = [p for p in module.student.parameters() if p.requires_grad]
    heads = [p for p in module.discriminator.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in module.teacher.parameters())
    first, second = module.updates(digit_batch, draws)
    assert (first.role, second.role) == ("student", "discriminator")
    assert any(g.any() for g in torch.autograd.grad(first.loss, student))
    found = torch.autograd.grad(second.loss, [*heads, *student], allow_unused=True)
    assert any(g is not None and g.any() for g in found[: len(heads)])
    assert all(g is None for g in found[len(heads) :])


def test_the_discriminators_optimiser_is_the_released_one_by_default(teacher: Make) -> None:
    module = adversarial(teacher)
    found = module.make_optimizer["discriminator"](module.discriminator.parameters())
    group = found.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-5, (0.0, 0.999), 1e-3)


def test_the_adversarial_gradient_reaches_the_student_through_the_frozen_features(
    teacher: Make, digit_batch: Batch
) -> None:
    module = adversarial(teacher)
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    update = next(module.updates(digit_batch, draws))
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        update.loss - module.distance(*module.pair(digit_batch, draws)[:2]),
        parameters,
        allow_unused=True,
    )
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_fake_and_real_are_alike_at_the_fixed_point(teacher: Make, digit_batch: Batch) -> None:
    """With as many phases as points the untrained student is the fixed point, so only the noise
    differs between fake and real and the best discriminator stays at chance."""
    module = PhasedConsistencyDistillation(
        teacher, num_phases=40, num_grid_points=40, adversarial_weight=0.1
    )
    module.configure_model()
    draws = module.draw(digit_batch, torch_generator(0, "draws"))
    pair = module.pair(digit_batch, draws)
    assert torch.equal(pair.student.detach(), pair.target)


def test_the_discriminators_time_lies_within_the_phase(teacher: Make, digit_batch: Batch) -> None:
    module = adversarial(teacher)
    batch: Batch = {**digit_batch, "sample": torch.zeros(4000, 1, 1, 1)}
    draws = module.draw(batch, torch_generator(0, "draws"))
    a = module._time_in_phase(draws)
    low = module.phases.edge_of.home[draws.index]
    assert (a >= low).all()
    assert (a <= module.phases.upper_edge_of.home[draws.index]).all()
    assert torch.equal(a, a.round())
    for edge, upper in ((0, 499), (499, 999)):
        inside = a[low == edge]
        assert float(inside.min()) < edge + 5
        assert float(inside.max()) > upper - 5


# ---------------------------------------------------------------------- options


def test_the_alpha_floor_is_refused_where_it_breaks_the_boundary(exact_teacher: Any) -> None:
    for phases, fits in ((1, True), (2, True), (4, False)):
        module = PhasedConsistencyDistillation(
            exact_teacher, num_phases=phases, num_grid_points=40, alpha_floor=0.5
        )
        if fits:
            module.configure_model()
            assert (module.student.alpha_floor, module.teacher.alpha_floor) == (0.5, 0.0)
        else:
            with pytest.raises(FewstepError, match="Use it with one or two phases"):
                module.configure_model()


def test_the_alpha_floor_is_for_epsilon_networks(teacher: Make) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=1, alpha_floor=0.5)
    with pytest.raises(FewstepError, match="alpha_floor is for epsilon networks"):
        module.configure_model()


def test_stochasticity_reaches_the_sampler(teacher: Make) -> None:
    module = PhasedConsistencyDistillation(teacher, num_phases=4, stochasticity=0.5)
    module.configure_model()
    noise, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.arange(2)}
    first, second = (module.sample(noise, cond, 4, torch_generator(0, "s", n)) for n in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, module.sample(noise, cond, 4, torch_generator(0, "s", 0)))


def test_lcms_boundary_has_no_phases(teacher: Make) -> None:
    with pytest.raises(FewstepError, match="use jump"):
        PhasedConsistencyDistillation(teacher, num_phases=4, boundary="lcm")


# ---------------------------------------------------------------------- the mixture test


@pytest.mark.slow
def test_four_phases_follow_a_mixtures_teacher_and_only_at_their_own_edges() -> None:
    """Spec of the paper, 7.3b and c: median error to the 40-step teacher from the same noise."""
    torch.manual_seed(0)
    schedule = VPSchedule()
    module = PhasedConsistencyDistillation(
        lambda: Denoiser(RingMixture(schedule, 5, std=0.3), schedule, "epsilon"),
        num_phases=4,
        num_grid_points=40,
        ema_decay=0.99,
    )
    module.configure_model()
    assert module.ema is not None
    mixture: GaussianMixture = module.student.backbone.mixture  # type: ignore[assignment]
    distil(module, mixture, 2500, 512, 3e-3)
    noise = torch.randn(4000, 2, generator=torch_generator(0, "noise"))
    exact = AnalyticDenoiser(mixture, schedule)
    truth = ode_sample(exact, noise.double(), None, schedule.spaced_times(40))

    def median_error(times: Tensor, denoiser: Any) -> float:
        found = phased_sample(denoiser, noise, None, times).double()
        return float((found - truth).norm(dim=1).median())

    edges = module.phases.sampling_times(4)
    student = median_error(edges, module.student)
    teacher = median_error(edges, module.teacher)
    shifted = median_error(edges + torch.tensor([0.0, 10, 10, 10, 0]), module.student)
    assert student < 0.03
    assert student < 0.2 * teacher
    assert shifted > 3 * student

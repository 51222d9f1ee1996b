from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    AnalyticDenoiser,
    Cond,
    FlowSchedule,
    Prediction,
    VPSchedule,
    phased_sample,
)
from fewstep.errors import FewstepError
from fewstep.guidance import (
    AdamMoments,
    Augmentor,
    Capped,
    FreeDoMRms,
    Guidance,
    LinearMeasurement,
    Matrix,
    NoiseOptimisation,
    Normalised,
    Polyak,
    Scheduled,
    StepRule,
    guided_sample,
    one_step_times,
    optimise_noise,
    phased_steps,
    plain_sample,
)
from fewstep.guidance.noise import chi_penalty
from fewstep.networks import ring

from guided import MATRIX, NOISE, TARGET, TIMES, randn

RULES = [Scheduled(0.1), Normalised(0.3), Polyak(0.3), Capped(Polyak(1.0), 0.2), AdamMoments(0.1)]
PULL = NoiseOptimisation(MATRIX, Capped(Polyak(0.5), 0.2), iterations=8)


ONE_STEP = torch.tensor([999.0, -1.0]).double()


class Plain:
    """A student whose one jump changes nothing."""

    schedule = VPSchedule(trajectory_end="clean")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        return Prediction(x_t, x_t)


def generators(count: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def optimised(net: Any, optimisation: NoiseOptimisation = PULL, **options: Any) -> Any:
    draws = options.pop("generator", None) or generators()
    base = phased_steps(net.schedule, 0.5)
    noise, target = options.pop("noise", NOISE), options.pop("target", TARGET)
    return optimise_noise(net, noise, None, TIMES, optimisation, target, draws, base, **options)


@pytest.mark.parametrize("rule", RULES)
def test_optimised_noise_gives_better_samples_with_every_rule(net: Any, rule: StepRule) -> None:
    run = optimised(net, NoiseOptimisation(MATRIX, rule, iterations=8))
    plain = plain_sample(net, NOISE, None, TIMES, generators(), phased_steps(net.schedule, 0.5))
    before = MATRIX(plain.samples, TARGET)
    assert bool((run.loss <= before + 1e-12).all())
    assert run.loss.mean() < 0.95 * before.mean()
    torch.testing.assert_close(run.loss, MATRIX(run.samples, TARGET))
    torch.testing.assert_close(run.trace.loss[0], before)


def test_the_same_sampler_finds_the_samples_again_from_the_optimised_noise(net: Any) -> None:
    run = optimised(net)
    base = phased_steps(net.schedule, 0.5)
    again = phased_sample(net, run.noise, None, TIMES, generators(), 0.5)
    torch.testing.assert_close(again, run.samples, rtol=0, atol=1e-10)
    # Guidance comes on top: it starts from that noise.
    guided = guided_sample(
        net, run.noise, None, TIMES, Guidance(MATRIX, Scheduled(0.0)), TARGET, generators(), base
    )
    torch.testing.assert_close(guided.samples, run.samples, rtol=0, atol=1e-10)


def test_the_gradient_passes_through_the_whole_chain(net: Any) -> None:
    rule = Scheduled(0.05)
    run = optimised(net, NoiseOptimisation(MATRIX, rule, iterations=1, shell="free"))
    h = 1e-5
    slope = torch.zeros_like(NOISE)
    for column in range(4):
        ends = []
        for sign in (1, -1):
            moved = NOISE.clone()
            moved[:, column] += sign * h
            samples = phased_sample(net, moved, None, TIMES, generators(), 0.5)
            ends.append(MATRIX(samples, TARGET))
        slope[:, column] = (ends[0] - ends[1]) / (2 * h)
    expected = NOISE - 0.05 * slope
    changed = run.chosen == 1
    assert changed.any()
    torch.testing.assert_close(run.noise[changed], expected[changed], rtol=0, atol=1e-7)


def test_a_sample_depends_on_no_batch_mate(net: Any) -> None:
    together = optimised(net)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = optimised(
            net, noise=NOISE[rows], target=TARGET[rows], generator=[generators()[row]]
        )
        torch.testing.assert_close(alone.samples[0], together.samples[row], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.noise[0], together.noise[row], rtol=0, atol=1e-10)
        assert alone.chosen[0] == together.chosen[row]


def test_checkpointing_changes_nothing_and_costs_are_counted(net: Any) -> None:
    saved, kept = optimised(net, checkpointing=True), optimised(net, checkpointing=False)
    torch.testing.assert_close(saved.samples, kept.samples)
    costs = saved.trace.costs
    assert costs == kept.trace.costs
    # Four jumps; eight iterations and one look at the last iterate.
    assert costs.denoiser_evaluations == 9 * 4
    assert costs.denoiser_gradients == 8 * 4
    assert costs.energy_evaluations == 9
    assert costs.seconds > 0
    assert saved.trace.times == (999.0,) * 8


def test_the_best_iterate_is_kept_for_each_sample_however_the_search_goes_on(net: Any) -> None:
    wild = NoiseOptimisation(MATRIX, Normalised(1.5), iterations=10)
    run = optimised(net, wild)
    table = run.trace.loss
    assert len(set(run.chosen.tolist())) > 1  # not one iterate for the whole batch
    for row in range(3):
        if run.chosen[row] < 10:
            torch.testing.assert_close(run.loss[row], table[run.chosen[row], row])
        assert run.loss[row] <= table[:, row].min() + 1e-12
    assert (table[-1] > run.loss + 1e-3).any()  # the last iterate would have been worse


@pytest.mark.parametrize("shell", ["own", "typical", "free"])
def test_noise_stays_on_its_shell(net: Any, shell: Any) -> None:
    run = optimised(net, NoiseOptimisation(MATRIX, Normalised(0.5), iterations=5, shell=shell))
    length, first = run.noise.norm(dim=1), NOISE.norm(dim=1)
    if shell == "own":
        torch.testing.assert_close(length, first)
    elif shell == "typical":
        torch.testing.assert_close(length, torch.full((3,), 2.0).double())
    else:
        assert (length - first).abs().max() > 0.1


def test_the_penalty_is_the_chi_density_and_keeps_free_noise_near_its_usual_length(
    net: Any,
) -> None:
    radius = torch.tensor([0.5, 1.0, 3**0.5, 2.5, 4.0]).double()
    penalty = chi_penalty(radius[:, None] * torch.full((1, 4), 0.5).double())
    log_density = 3 * radius.log() - radius.square() / 2
    torch.testing.assert_close(penalty, log_density[2] - log_density)
    assert penalty[2].abs() < 1e-12
    assert chi_penalty(torch.ones(2, 1)).tolist() == [0.5, 0.5]
    lengths = []
    for weight in (0.0, 100.0):  # the target is where only long noise leads
        rule = NoiseOptimisation(MATRIX, Normalised(0.3), 20, shell="free", penalty=weight)
        run = optimise_noise(Plain(), NOISE, None, ONE_STEP, rule, 20 * TARGET.sign())
        lengths.append(run.noise.norm(dim=1))
    assert lengths[0].min() > 4
    assert lengths[1].max() < 3


def test_the_best_is_chosen_by_views_that_no_gradient_saw_and_that_stay_the_same(
    net: Any,
) -> None:
    seen: list[Tensor] = []

    class Watching(Augmentor):
        copies, numbers = 2, 3

        def __call__(self, x: Tensor, target: Any, uniform: Tensor) -> Any:
            seen.append(uniform)
            return x, target

    run = optimised(net, NoiseOptimisation(MATRIX, Normalised(0.2), 3, augmentor=Watching()))
    plain = optimised(net, NoiseOptimisation(MATRIX, Normalised(0.2), 3))
    # A gradient's views, then the ruler, three times; then the ruler for the last iterate.
    gradients, rulers = seen[0:6:2], [*seen[1:6:2], seen[6]]
    assert len(seen) == 7
    assert all(torch.equal(rulers[0], ruler) for ruler in rulers)
    assert len({tuple(views.flatten().tolist()) for views in [*gradients, rulers[0]]}) == 4
    assert run.trace.costs.energy_evaluations == 2 * 7
    torch.testing.assert_close(run.samples, plain.samples)  # these views show all the same


def test_a_sample_without_a_finite_loss_keeps_its_noise_and_spoils_no_other(net: Any) -> None:
    spoilt = TARGET.clone()
    spoilt[1] = torch.nan
    good, bad = (optimised(net, target=t, largest_move=None) for t in (TARGET, spoilt))
    torch.testing.assert_close(bad.samples[[0, 2]], good.samples[[0, 2]])
    torch.testing.assert_close(bad.noise[1], NOISE[1])
    assert bad.loss[1] == torch.inf
    assert bad.trace.nonfinite.any(0).tolist() == [False, True, False]
    with pytest.raises(FewstepError, match="not finite in 1 of 3 samples"):
        optimised(net, target=spoilt)


def test_one_step_of_a_teacher_does_not_hear_its_noise_so_there_is_nothing_to_optimise() -> None:
    teacher, noise = AnalyticDenoiser(ring(5), FlowSchedule()), randn(5, 2)
    energy = LinearMeasurement(Matrix(torch.ones(1, 2)))
    rule, target = NoiseOptimisation(energy, Polyak(0.3), 5), torch.ones(5, 1).double()
    run = optimise_noise(teacher, noise, None, one_step_times(teacher.schedule), rule, target)
    assert run.trace.displacement.max() < 1e-12
    assert run.samples.std(0).max() < 1e-6
    assert run.samples.isfinite().all()


def test_what_cannot_be_optimised_is_refused_with_advice(net: Any) -> None:
    with pytest.raises(FewstepError, match="stay in place"):
        optimised(net, NoiseOptimisation(MATRIX, FreeDoMRms()))
    with pytest.raises(FewstepError, match="use plain_sample"):
        NoiseOptimisation(MATRIX, Polyak(), iterations=0)
    with pytest.raises(FewstepError, match="Set shell: free"):
        NoiseOptimisation(MATRIX, Polyak(), penalty=1.0)
    with pytest.raises(FewstepError, match="diverged"):
        optimised(net, NoiseOptimisation(MATRIX, Scheduled(1e6), shell="free"))
    with pytest.raises(FewstepError, match="give each sample its own"):
        optimised(net, target=TARGET[:2])

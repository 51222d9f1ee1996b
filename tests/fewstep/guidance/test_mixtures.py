"""Guidance towards a rare mode of a mixture, where being on the target is not all that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import DenoiserLike, ode_sample
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    BaseStep,
    Capped,
    FixedShare,
    Guidance,
    MixtureLikelihood,
    Polyak,
    Scheduled,
    augmented_polyak,
    freedom,
    guided_sample,
)

from guided import (
    COUNT,
    DIM,
    EXACT,
    FEATURES,
    LABELS,
    MEANS,
    MIXTURE,
    SCHEDULE,
    STD,
    Features,
    FlowMap,
    outcome,
    randn,
)


def walk(
    guidance: Guidance,
    num_steps: int,
    denoiser: DenoiserLike = EXACT,
    target: Tensor = FEATURES,
    base: BaseStep | None = None,
) -> Tensor:
    times, draws = SCHEDULE.spaced_times(num_steps), torch.Generator().manual_seed(9)
    noise = randn(COUNT, DIM, seed=5)
    run = guided_sample(denoiser, noise, None, times, guidance, target, draws, base or DDIM())
    return run.samples


def test_all_samples_on_the_class_does_not_make_them_samples_of_the_class() -> None:
    times, noise = SCHEDULE.spaced_times(50), randn(COUNT, DIM, seed=5)
    exact = ode_sample(EXACT, noise, {"class_labels": LABELS}, times)
    guidance = Guidance(MixtureLikelihood(MIXTURE), Scheduled(1.0, "score"))
    point = walk(guidance, 50, target=LABELS)
    assert outcome(exact).accuracy == outcome(point).accuracy == 1
    assert (exact.mean(0) - MEANS[0]).norm() < 0.5 * STD
    assert (point.mean(0) - MEANS[0]).norm() > 0.9 * STD


def test_a_capped_polyak_step_needs_fewer_steps_than_a_fixed_one_as_near_to_the_modes() -> None:
    ours = outcome(walk(augmented_polyak(Features(), 0.1, cap=0.2), 20))
    for strength in (0.3, 1.0, 3.0):
        fixed = outcome(walk(freedom(Features(), strength), 20))
        assert ours.accuracy > fixed.accuracy + 0.03
        assert ours.loss < 0.8 * fixed.loss
        assert strength < 1 or ours.off_mode < fixed.off_mode


def test_a_capped_polyak_step_hardly_depends_on_its_strength() -> None:
    rows = [outcome(walk(augmented_polyak(Features(), s, cap=0.2), 100)) for s in (0.01, 0.1)]
    assert min(row.accuracy for row in rows) > 0.85
    assert rows[0].loss == pytest.approx(rows[1].loss, rel=0.3)


@pytest.mark.parametrize("strength", [0.01, 0.1])
def test_the_published_polyak_step_diverges_on_a_cross_entropy_and_says_so(
    strength: float,
) -> None:
    energy = MixtureLikelihood(MIXTURE)
    with pytest.raises(FewstepError, match="Guidance diverged"):
        walk(augmented_polyak(energy, strength, cap=None), 50, target=LABELS)
    samples = walk(augmented_polyak(energy, strength, cap=0.1), 50, target=LABELS)
    assert outcome(samples).off_mode < 1.2
    assert samples.norm(dim=1).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_guided_few_step_student_stays_on_the_modes_where_posterior_means_do_not(
    num_steps: int,
) -> None:
    guidance = Guidance(Features(), Capped(Polyak(0.2), 0.2), inner_steps=4)
    none = Guidance(Features(), Scheduled(0.0))
    base = FixedShare(1.0)
    student = outcome(walk(guidance, num_steps, FlowMap(), base=base))
    unguided = outcome(walk(none, num_steps, FlowMap(), base=base))
    mean = outcome(walk(guidance, num_steps, base=base))
    assert student.off_mode < 1.25
    assert mean.off_mode > 2
    assert student.accuracy > unguided.accuracy + 0.05
    assert student.loss < 0.97 * unguided.loss

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, VPSchedule
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Augmentor,
    BestOf,
    Capped,
    Energy,
    Guidance,
    GuidedSamples,
    NoiseOptimisation,
    Polyak,
    Scheduled,
    guided_sample,
    optimise_noise,
    plain_sample,
)
from fewstep.guidance.selection import Keeper
from fewstep.seeding import normal_like, torch_generator

from guided import MATRIX, NOISE, TARGET, TIMES

NUMBERS = [7, 3, 12]


class Told:
    """A student that adds what it is told."""

    schedule = VPSchedule(trajectory_end="clean")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        assert cond is not None
        return Prediction(x_t + cond["level"][:, None], x_t)


def plain(net: Any) -> Any:
    return lambda noise, cond, target, draws: plain_sample(net, noise, cond, TIMES, draws, DDIM(1))


def selected(net: Any, count: int = 6, **options: Any) -> Any:
    rows = options.pop("rows", slice(0, 3))
    sampler = options.pop("sampler", None) or plain(net)
    seed = options.pop("seed", 0)
    best = BestOf(count, options.pop("energy", MATRIX), **options)
    return best(sampler, NOISE[rows], NUMBERS[rows], target=TARGET[rows], seed=seed)


def test_the_candidate_with_the_lowest_energy_is_kept_for_each_sample(net: Any) -> None:
    run = selected(net)
    torch.testing.assert_close(run.losses.amin(0), MATRIX(run.samples, TARGET))
    assert run.chosen.tolist() == run.losses.argmin(0).tolist()
    assert len(set(run.chosen.tolist())) > 1
    assert len(run.losses.unique()) == 18  # no two candidates are the same
    # More candidates are never worse: the first ones stay the same.
    torch.testing.assert_close(selected(net, 2).losses, run.losses[:2])


def test_a_candidate_is_a_function_of_seed_sample_and_number_alone(net: Any) -> None:
    run = selected(net)
    for n, k in ((7, 0), (12, 4)):
        draws = [torch_generator(0, "candidate", n, k)]
        noise = normal_like(NOISE[:1], draws)
        sample = plain_sample(net, noise, None, TIMES, draws, DDIM(1)).samples
        row = NUMBERS.index(n)
        torch.testing.assert_close(MATRIX(sample, TARGET[row : row + 1])[0], run.losses[k, row])
    for row in range(3):
        alone = selected(net, rows=slice(row, row + 1))
        torch.testing.assert_close(alone.samples[0], run.samples[row], rtol=0, atol=1e-10)
    for together in (2, 4, 6):
        several = selected(net, together=together)
        torch.testing.assert_close(several.samples, run.samples, rtol=0, atol=1e-10)
        torch.testing.assert_close(several.losses, run.losses, rtol=0, atol=1e-10)
        assert several.trace.costs == run.trace.costs
    assert not torch.equal(selected(net, seed=1).losses, run.losses)


@pytest.mark.parametrize("together", [1, 4])
def test_the_first_candidate_can_be_the_sample_there_would_be_without(
    net: Any, together: int
) -> None:
    def draws() -> list[torch.Generator]:
        return [torch_generator(9, "own", n) for n in NUMBERS]

    own = plain(net)(NOISE, None, None, draws()).samples
    best = BestOf(6, MATRIX, together=together)
    run = best(plain(net), NOISE, NUMBERS, target=TARGET, first=(NOISE, draws()))
    torch.testing.assert_close(run.losses[0], MATRIX(own, TARGET))
    torch.testing.assert_close(run.losses[1:], selected(net).losses[1:])
    blind = best(plain(net), NOISE, NUMBERS, target=TARGET, first=(NOISE, None))
    assert (blind.losses[0] - run.losses[0]).abs().min() > 1e-6  # another walk from that noise


def test_guidance_and_noise_optimisation_are_drawn_from_like_any_sampler(net: Any) -> None:
    guidance = Guidance(MATRIX, Scheduled(0.2))
    search = NoiseOptimisation(MATRIX, Capped(Polyak(0.5), 0.2), iterations=3)

    def guided(noise: Tensor, cond: Any, target: Any, draws: Any) -> GuidedSamples:
        return guided_sample(net, noise, cond, TIMES, guidance, target, draws)

    def optimised(noise: Tensor, cond: Any, target: Any, draws: Any) -> GuidedSamples:
        return optimise_noise(net, noise, cond, TIMES, search, target, draws)

    alone = selected(net).losses.amin(0).mean()
    for sampler, evaluations, gradients, energies in (
        (guided, 4 * 6, 4 * 6, 4 * 6 + 6),
        (optimised, 16 * 6, 12 * 6, 4 * 6 + 6),
    ):
        run = selected(net, sampler=sampler, together=4)
        costs = run.trace.costs
        assert costs.denoiser_evaluations == evaluations
        assert costs.denoiser_gradients == gradients
        assert costs.energy_evaluations == energies
        assert run.losses.amin(0).mean() < alone
        # The trace is that of the chosen ones.
        for row in range(3):
            k, n = int(run.chosen[row]), NUMBERS[row]
            draws = [torch_generator(0, "candidate", n, k)]
            noise = normal_like(NOISE[:1], draws)
            again = sampler(noise, None, TARGET[row : row + 1], draws)
            torch.testing.assert_close(again.trace.loss[:, 0], run.trace.loss[:, row])
            torch.testing.assert_close(again.trace.alignment[:, 0], run.trace.alignment[:, row])
            assert again.trace.times == run.trace.times


def test_candidates_of_a_sample_are_ranked_by_the_same_views(net: Any) -> None:
    seen: list[Tensor] = []

    class Watching(Augmentor):
        copies, numbers = 3, 2

        def __call__(self, x: Tensor, target: Any, uniform: Tensor) -> Any:
            seen.append(uniform)
            return x, target

    run = selected(net, 4, augmentor=Watching(), together=2)
    assert len(seen) == 4
    assert all(torch.equal(views, seen[0]) for views in seen)
    assert len(seen[0].unique()) == 3 * 3 * 2
    assert run.trace.costs.energy_evaluations == 4 * 3


def test_conditions_and_targets_go_with_their_samples() -> None:
    told = []

    class Echo(Energy):
        def __call__(self, x0: Tensor, target: Any) -> Tensor:
            return (x0[:, 0] - target["sign"][:, 0]).abs()

    def sampler(
        noise: Tensor, cond: Any, target: Any, draws: Sequence[torch.Generator]
    ) -> GuidedSamples:
        told.append((cond["level"].tolist(), target["sign"][:, 0].tolist(), len(draws)))
        return plain_sample(Told(), noise, cond, torch.tensor([999.0, -1.0]).double(), draws)

    best = BestOf(3, Echo(), together=2)
    sign = torch.tensor([[1.0], [-1.0]])
    level = torch.tensor([10.0, 20.0])
    run = best(sampler, NOISE[:2], [0, 1], {"level": level}, {"sign": sign})
    assert told == [([10, 20, 10, 20], [1, -1, 1, -1], 4), ([10, 20], [1, -1], 2)]
    # What each was told is in it; of three candidates it is the one that suits its target best.
    assert (run.samples.mean(1) - level).abs().max() < 2
    torch.testing.assert_close(run.losses.amin(0), (run.samples[:, 0] - sign[:, 0]).abs())


def test_a_loss_that_is_not_finite_never_wins_and_none_that_is_is_refused(net: Any) -> None:
    class Spotty(Energy):
        """Not finite for about half of all samples."""

        def __call__(self, x0: Tensor, target: Any) -> Tensor:
            return torch.where(x0[:, 0] > 0, torch.nan, x0[:, 0].square())

    class Never(Energy):
        def __call__(self, x0: Tensor, target: Any) -> Tensor:
            return x0[:, 0] * torch.nan

    run = selected(net, 8, energy=Spotty())
    assert run.losses.isinf().any()
    assert bool((run.samples[:, 0] <= 0).all())
    with pytest.raises(FewstepError, match="None of 8 candidates"):
        selected(net, 8, energy=Never())


def test_what_cannot_be_selected_is_refused(net: Any) -> None:
    with pytest.raises(FewstepError, match="give each its own"):
        BestOf(2, MATRIX)(plain(net), NOISE, [0, 1], target=TARGET)
    with pytest.raises(FewstepError, match="a count of 1 or more"):
        BestOf(0, MATRIX)


def test_a_keeper_keeps_what_came_with_the_lowest_loss() -> None:
    keeper = Keeper()
    for loss, row in (([torch.nan, 2.0], 0.0), ([5.0, torch.nan], 1.0), ([5.0, 1.0], 2.0)):
        keeper.offer(torch.tensor(loss), torch.full((2, 3), row), torch.tensor([row > 0] * 2))
    assert keeper.loss.tolist() == [5.0, 1.0]
    assert keeper.chosen.tolist() == [1, 2]
    assert keeper.rows[0][:, 0].tolist() == [1.0, 2.0]
    assert keeper.rows[1].tolist() == [True, True]

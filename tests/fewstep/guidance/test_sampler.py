from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    Cond,
    Denoiser,
    Guided,
    Prediction,
    VPSchedule,
    ode_sample,
)
from fewstep.errors import FewstepError
from fewstep.guidance import (
    DDIM,
    Augmentor,
    Capped,
    DiffAugment,
    Energy,
    Guidance,
    LinearMeasurement,
    Matrix,
    Normalised,
    Polyak,
    Recurrence,
    Scheduled,
    Smoothing,
    Window,
    guided_sample,
)
from fewstep.networks import RingMixture

from guided import MATRIX, NOISE, TARGET, TIMES, picture_net, randn


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@dataclass(frozen=True)
class Distance(Energy):
    def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return (torch.tanh(x0) - target).square().mean((1, 2, 3))


EVERYTHING = Guidance(
    Distance(),
    state=Capped(Polyak(0.1, "eps_norm"), 0.2),
    clean=Normalised(0.5),
    clean_iterations=2,
    augmentor=DiffAugment(copies=3),
    smoothing=Smoothing(0.3, copies=2),
    recurrence=Recurrence(2, Window(300, 800)),
)


def pictures(rows: slice, guidance: Guidance = EVERYTHING, **options: Any) -> Any:
    noise, target = randn(4, 3, 8, 8)[rows], randn(4, 3, 8, 8, seed=1)[rows].tanh()
    draws = generators(4)[rows]
    denoiser = options.pop("denoiser", None) or picture_net()
    cond = options.pop("cond", None)
    return guided_sample(denoiser, noise, cond, TIMES, guidance, target, draws, DDIM(1), **options)


def test_a_sample_depends_on_no_batch_mate() -> None:
    together = pictures(slice(0, 4))
    for row in range(4):
        alone = pictures(slice(row, row + 1))
        torch.testing.assert_close(alone.samples[0], together.samples[row], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.trace.loss[:, 0], together.trace.loss[:, row])
    assert not torch.equal(together.samples[0], together.samples[1])


def test_a_sample_without_a_finite_loss_spoils_no_other(net: Any) -> None:
    spoilt = TARGET.clone()
    spoilt[1] = torch.nan
    guidance = Guidance(MATRIX, Scheduled(0.3), Normalised(0.1))
    good, bad = (
        guided_sample(net, NOISE, None, TIMES, guidance, target, largest_move=None)
        for target in (TARGET, spoilt)
    )
    torch.testing.assert_close(bad.samples[[0, 2]], good.samples[[0, 2]])
    # It is sampled as if there were no guidance, and the trace says so.
    torch.testing.assert_close(bad.samples[1], ode_sample(net, NOISE, None, TIMES)[1])
    assert bad.trace.nonfinite.any(0).tolist() == [False, True, False]
    with pytest.raises(FewstepError, match="not finite in 1 of 3 samples"):
        bad.trace.check()


def test_smoothing_and_views_leave_the_noise_of_the_walk_alone() -> None:
    silent = Guidance(
        Distance(), Scheduled(0.0), augmentor=DiffAugment(3), smoothing=Smoothing(0.3, 2)
    )
    plain = Guidance(Distance(), Scheduled(0.0))
    assert torch.equal(pictures(slice(0, 4), silent).samples, pictures(slice(0, 4), plain).samples)


def test_views_are_drawn_anew_in_every_round_and_run_but_follow_the_generator(net: Any) -> None:
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Watching(Augmentor):
        copies: int = 2
        numbers: int = 3

        def __call__(
            self, x: Tensor, target: Tensor | None, uniform: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            seen.append(uniform)
            return x, target

    guidance = Guidance(MATRIX, Scheduled(0.1), augmentor=Watching(), recurrence=Recurrence(2))
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        guided_sample(net, NOISE, None, TIMES, guidance, TARGET, generator)
    first, again, other = seen[:8], seen[8:16], seen[16:]
    assert all(x.shape == (6, 3) and bool((x > 0).all() and (x < 1).all()) for x in first)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert len(torch.stack(first + other).flatten().unique()) == 16 * 18


def test_parameters_collect_no_gradient_and_keep_asking_for_it() -> None:
    denoiser, asked = picture_net(), []
    denoiser.backbone.register_forward_hook(
        lambda *_: asked.append(any(p.requires_grad for p in denoiser.parameters()))
    )
    run = pictures(slice(0, 2), denoiser=denoiser)
    assert asked
    assert not any(asked)
    assert not run.samples.requires_grad
    assert not run.trace.loss.requires_grad
    assert all(p.grad is None and p.requires_grad for p in denoiser.parameters())


def test_checkpointing_changes_nothing_but_when_the_network_runs() -> None:
    denoiser, calls = picture_net(), []
    denoiser.backbone.register_forward_hook(lambda *_: calls.append(1))
    plain = pictures(slice(0, 2), denoiser=denoiser)
    assert len(calls) == plain.trace.costs.denoiser_evaluations
    saved = pictures(slice(0, 2), denoiser=denoiser, checkpointing=True)
    again = plain.trace.costs.denoiser_gradients
    assert len(calls) == 2 * plain.trace.costs.denoiser_evaluations + again
    torch.testing.assert_close(plain.samples, saved.samples)
    assert plain.trace.costs == saved.trace.costs


def test_classifier_free_guidance_comes_on_top() -> None:
    cond = {"level": torch.tensor([0.5, -0.5]).double()}
    guidance = Guidance(Distance(), Scheduled(3.0))
    denoiser = picture_net()

    def by_hand(x_t: Tensor, t: Tensor, given: Cond | None = None) -> Prediction:
        with_cond, without = (denoiser.raw(x_t, t, c) for c in (cond, None))
        return denoiser.interpret(without + 4 * (with_cond - without), x_t, t)

    by_hand.schedule = denoiser.schedule  # type: ignore[attr-defined]
    ours = pictures(slice(0, 2), guidance, denoiser=Guided(denoiser, 4.0), cond=cond)
    expected = pictures(slice(0, 2), guidance, denoiser=by_hand)
    torch.testing.assert_close(ours.samples, expected.samples, rtol=0, atol=1e-10)
    assert all(p.requires_grad for p in denoiser.parameters())


def test_the_unconditional_branch_can_be_left_out_of_the_gradient() -> None:
    cond = {"level": torch.tensor([0.5, -0.5]).double()}
    guidance, denoiser = Guidance(Distance(), Scheduled(3.0)), picture_net()

    def by_hand(x_t: Tensor, t: Tensor, given: Cond | None = None) -> Prediction:
        with_cond, without = (denoiser.raw(x_t, t, c) for c in (cond, None))
        without = without.detach()
        return denoiser.interpret(without + 4 * (with_cond - without), x_t, t)

    by_hand.schedule = denoiser.schedule  # type: ignore[attr-defined]
    both = pictures(slice(0, 2), guidance, denoiser=Guided(denoiser, 4.0), cond=cond)
    one = Guided(denoiser, 4.0, detach_null=True)
    ours = pictures(slice(0, 2), guidance, denoiser=one, cond=cond)
    expected = pictures(slice(0, 2), guidance, denoiser=by_hand)
    torch.testing.assert_close(ours.samples, expected.samples, rtol=0, atol=1e-10)
    assert (ours.samples - both.samples).abs().max() > 1e-4


def test_guiding_the_clean_estimate_asks_the_denoiser_for_no_gradient() -> None:
    asked = []

    class Watched:
        schedule = VPSchedule(trajectory_end="clean")

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
            asked.append(torch.is_grad_enabled())
            return Prediction(x_t / 2, x_t)

    for guidance, through in (
        (Guidance(MATRIX, clean=Scheduled(0.1)), False),
        (Guidance(MATRIX, state=Scheduled(0.1)), True),
    ):
        asked.clear()
        guided_sample(Watched(), NOISE, None, TIMES, guidance, TARGET)
        assert asked == [through] * 4


def test_callers_under_no_grad_and_in_single_precision_are_served() -> None:
    denoiser = Denoiser(RingMixture(VPSchedule(), 5), VPSchedule(), "epsilon")
    noise, target = randn(3, 2).float(), torch.ones(3, 1)
    guidance = Guidance(LinearMeasurement(Matrix(torch.ones(1, 2))), Scheduled(0.05))
    plain = guided_sample(denoiser, noise, None, TIMES[:4], guidance, target)
    with torch.no_grad():
        under = guided_sample(denoiser, noise, None, TIMES[:4], guidance, target)
        assert not torch.is_grad_enabled()
    assert torch.equal(plain.samples, under.samples)
    assert plain.samples.dtype == torch.float32
    double = guided_sample(denoiser, noise.double(), None, TIMES[:4], guidance, target.double())
    torch.testing.assert_close(plain.samples.double(), double.samples, rtol=0, atol=1e-4)


def test_inference_mode_is_refused_with_advice(net: Any) -> None:
    with (
        torch.inference_mode(),
        pytest.raises(FewstepError, match="inference_mode: false on the trainer"),
    ):
        guided_sample(net, NOISE, None, TIMES, Guidance(MATRIX, Scheduled(0.1)), TARGET)


def test_a_denoiser_that_cuts_the_graph_is_refused(net: Any) -> None:
    class Cut:
        schedule = net.schedule

        @torch.no_grad()
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
            return net(x_t, t)

    with pytest.raises(FewstepError, match="no_grad or detach in the denoiser"):
        guided_sample(Cut(), NOISE, None, TIMES, Guidance(MATRIX, Scheduled(0.1)), TARGET)


def test_a_loss_for_the_whole_batch_is_refused(net: Any) -> None:
    class Mean(LinearMeasurement):
        def __call__(self, x0: Tensor, target: Tensor | None) -> Tensor:
            return super().__call__(x0, target).mean()

    guidance = Guidance(Mean(MATRIX.operator), Scheduled(0.1))
    with pytest.raises(FewstepError, match="one loss for each sample"):
        guided_sample(net, NOISE, None, TIMES, guidance, TARGET)

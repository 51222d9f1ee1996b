"""The benchmark of adversarial PCM compares the same mathematics, and counts what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from lightning_modules.phased_consistency_distillation import PhasedDraws
from scripts.benchmark_adversarial import SIZES, main, parser, settings_of
from scripts.benchmark_step import Step
from scripts.benchmarks.adversarial import Settings, random_batch
from scripts.benchmarks.adversarial_steps import Contestant, Ours, Straightforward
from scripts.benchmarks.stopwatch import ROLES, Stopwatch

TINY = Settings(
    channels=(32, 64), text_width=16, latent=8, batch=2, rank=4, head_width=32, threads=1, blocks=1
)
TINY_OPTIONS = [
    *("--device", "cpu", "--channels", "32", "64", "--latent", "8", "--text-width", "16"),
    *("--batch", "1", "--rank", "4", "--head-width", "32", "--threads", "1", "--blocks", "1"),
]
Losses = dict[str, tuple[Tensor, dict[str, Tensor]]]


def weights(side: Contestant) -> dict[str, dict[str, Tensor]]:
    """What is trained, by role and by peft's name for one adapter."""
    roles = {"student": side.student, "discriminator": side.discriminator}
    return {
        role: {
            name.removeprefix("backbone.network.")
            .removeprefix("adapter.")
            .replace(".default.", "."): p
            for name, p in network.named_parameters()
            if p.requires_grad
        }
        for role, network in roles.items()
    }


def pair_of(settings: Settings) -> tuple[Ours, Straightforward]:
    """Both sides with the same weights, none of them zero as new adapters are."""
    ours, plain = Ours(settings), Straightforward(settings)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role, mine in weights(ours).items():
            other = weights(plain)[role]
            assert mine.keys() == other.keys()
            for name, parameter in mine.items():
                parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.02)
                other[name].copy_(parameter)
        for average in (*ours.averaged(), *plain.averaged()):
            average.zero_()  # so that a step moves it by more than rounding
    return ours, plain


def set_dtype(side: Contestant, dtype: torch.dtype) -> None:
    for module in (side.teacher, side.student, side.discriminator):
        module.to(dtype)
    side.draws = [typed(draws, dtype) for draws in side.draws[:1]]


def typed(draws: PhasedDraws, dtype: torch.dtype) -> PhasedDraws:
    noises = {n: v.to(dtype) for n, v in vars(draws).items() if n.endswith("noise")}
    return replace(draws, **noises)


def batch_of(side: Contestant, settings: Settings) -> Batch:
    batch, dtype = random_batch(settings), side.draws[0].noise.dtype
    cond = {name: value.to(dtype) for name, value in batch["cond"].items()}
    return {"sample": batch["sample"].to(dtype), "cond": cond, "key": batch["key"]}


def gradients(side: Contestant, role: str) -> dict[str, Tensor]:
    found = {}
    for name, parameter in weights(side)[role].items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def ours_of(side: Ours, settings: Settings) -> Losses:
    found: Losses = {}
    with side.autocast():
        for update in side.module.updates(batch_of(side, settings), side.draws[0]):
            side.backward(update.loss, side.trained()[update.role])
            found[update.role] = update.loss.detach(), gradients(side, update.role)
    return found


def plain_of(side: Straightforward, settings: Settings) -> Losses:
    batch, draws = batch_of(side, settings), side.draws[0]
    with side.autocast():
        jumps = side.jumps(batch, draws)
        loss = side.student_loss(jumps, batch, draws)
    side.backward(loss)
    found: Losses = {"student": (loss.detach(), gradients(side, "student"))}
    side.optimizers["discriminator"].zero_grad()
    with side.autocast():
        judged = side.discriminator_loss(jumps, batch, draws)
    side.backward(judged)
    return {**found, "discriminator": (judged.detach(), gradients(side, "discriminator"))}


def cancels(name: str) -> bool:
    """The hinge's gradients of a score's bias are 1 and -1, as long as no score is beyond 1."""
    return name.endswith("score.bias")


def far_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest value of all."""
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[n] - value).abs().max()) for n, value in expected.items()) / scale


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "loss_limit", "gradient_limit"),
    [
        (torch.float64, False, 1e-12, 1e-9),
        pytest.param(torch.float64, True, 1e-12, 1e-9, marks=pytest.mark.slow),
        # Guidance and 1 / alpha make more of rounding than the pseudo-Huber constant forgives.
        (torch.float32, False, 1e-5, 5e-4),
    ],
)
def test_losses_and_gradients_of_both_sides_are_the_same(
    dtype: torch.dtype, checkpoint: bool, loss_limit: float, gradient_limit: float
) -> None:
    settings = replace(TINY, checkpoint=checkpoint)
    ours, plain = pair_of(settings)
    for side in (ours, plain):
        set_dtype(side, dtype)
    mine, other = ours_of(ours, settings), plain_of(plain, settings)
    for role in ("student", "discriminator"):
        (loss, found), (other_loss, expected) = mine[role], other[role]
        assert loss.dtype == dtype
        assert float(loss) == pytest.approx(float(other_loss), rel=loss_limit), role
        assert all(value.any() for name, value in expected.items() if not cancels(name)), role
        assert far_apart(found, expected) < gradient_limit, role


@pytest.mark.slow
def test_steps_of_both_sides_train_the_same_weights() -> None:
    ours, plain = pair_of(TINY)
    before = {role: [p.detach().clone() for p in ps] for role, ps in ours.trained().items()}
    for update in range(3):
        for side in (ours, plain):
            side.step(random_batch(TINY), update)
    for role, mine in weights(ours).items():
        moved = torch.cat(
            [(p - b).flatten() for p, b in zip(mine.values(), before[role], strict=True)]
        )
        other = weights(plain)[role]
        apart = torch.cat([(p - other[name]).flatten() for name, p in mine.items()])
        assert moved.abs().max() > 1e-5, role
        assert apart.norm() < 0.02 * moved.norm(), role
    mine, other = (
        dict(zip(weights(s)["student"], s.averaged(), strict=True)) for s in (ours, plain)
    )
    for name, average in mine.items():
        assert average.any(), name
        torch.testing.assert_close(other[name], average, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bases", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_in_bfloat16_everything_trained_has_a_gradient_in_float32(bases: str) -> None:
    settings = settings_of(
        parser().parse_args([*TINY_OPTIONS, "--dtype", "bf16", "--plain-bases", bases])
    )
    ours, plain = pair_of(settings)
    mine, other = ours_of(ours, settings), plain_of(plain, settings)
    for role in ("student", "discriminator"):
        (loss, found), (other_loss, expected) = mine[role], other[role]
        assert float(loss) == pytest.approx(float(other_loss), rel=0.05), role
        for name, gradient in (*found.items(), *expected.items()):
            assert gradient.dtype == torch.float32
            assert gradient.any() or cancels(name), name
    kept = {p.dtype for p in plain.teacher.parameters()}
    assert kept == {torch.bfloat16 if bases == "bf16" else torch.float32}


@pytest.mark.slow
def test_the_watch_counts_evaluations_and_splits_the_time_of_a_step() -> None:
    ours, plain = Ours(TINY), Straightforward(TINY)
    expected: list[tuple[Contestant, Step, dict[str, int], int]] = [
        (ours, ours.step, {"teacher": 2, "student": 2, "discriminator": 2}, 5),
        (plain, plain.step, {"teacher": 2, "student": 2, "discriminator": 3}, 7),
        (plain, plain.alternating_step, {"teacher": 4, "student": 4, "discriminator": 3}, 11),
    ]
    sides: tuple[Contestant, ...] = (ours, plain)
    watches = {side: Stopwatch(side, TINY.batch) for side in sides}
    for side, step, forward, calls in expected:
        watch = watches[side]
        watch.restart()
        taken = watch.measure(partial(step, random_batch(TINY), 0))
        assert watch.forward == forward
        assert watch.backward == {"student": 1, "discriminator": 1}
        assert watch.calls == calls
        assert set(taken) == set(ROLES)
        assert min(taken.values()) > 0


def test_the_straightforward_side_holds_a_base_more() -> None:
    ours, plain = Ours(TINY), Straightforward(TINY)
    count = {side: sum(t.numel() for t in side.held()) for side in (ours, plain)}
    assert count[plain] - count[ours] == sum(p.numel() for p in ours.teacher.parameters())


@pytest.mark.slow
def test_the_table_says_what_was_measured_and_what_bounds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*TINY_OPTIONS, "--json", str(tmp_path / "found.json")])
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    ways, memory = found["ways"], found["memory"]
    assert list(ways) == ["ours", "straightforward", "alternating"]
    for way in ways.values():
        assert way["seconds"] > 0
        assert sum(way["shares"].values()) == pytest.approx(1)
    for side in memory.values():
        assert side["peak"] > side["held"] > 0
    time = ways["ours"]["seconds"] / ways["straightforward"]["seconds"]
    assert f"straightforward  {time:5.2f}  aim 0.75" in printed
    assert "ratios of time would be 0.89 (straightforward), 0.62 (alternating)" in printed


def test_named_sizes_may_be_changed_in_part() -> None:
    asked = ["--device", "cpu", "--size", "sd15", "--batch", "4", "--dtype", "bf16"]
    settings = settings_of(parser().parse_args(asked))
    assert settings.channels == SIZES["sd15"]["channels"]
    assert (settings.batch, settings.rank, settings.latent) == (4, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--channels", "48", "96"], "multiples of 32"),
        (["--latent", "30"], "multiple of 4"),
    ],
)
def test_a_size_that_makes_no_network_says_what_to_give(options: list[str], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        settings_of(parser().parse_args(["--device", "cpu", *options]))

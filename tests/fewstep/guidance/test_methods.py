"""Each method against the loop its authors describe, written out with alpha-bars alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.guidance import (
    DDIM,
    Augmentor,
    BaseStep,
    FixedShare,
    Guidance,
    LinearMeasurement,
    Matrix,
    Recurrence,
    Window,
    augmented_polyak,
    dps,
    freedom,
    guided_sample,
    lgd_mc,
    mpgd,
    own_stream,
    tfg,
    universal,
)

TIMES = torch.tensor([999.0, 799.0, 599.0, 399.0, 199.0, -1.0]).double()
BATCH = 3
Move = Callable[["Loop", Tensor, int], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


A, Y, NOISE = randn(2, 4, seed=1), randn(BATCH, 2, seed=2), randn(BATCH, 4, seed=3)
ENERGY = LinearMeasurement(Matrix(A))


def distance(x0: Tensor, y: Tensor = Y) -> Tensor:
    return ((x0 @ A.T - y) ** 2).sum(-1).sqrt()


def slope(losses: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), x)[0]


@dataclass
class Loop:
    """The parts that all published loops share."""

    net: Any
    base: BaseStep

    def __post_init__(self) -> None:
        self.draws = torch.Generator().manual_seed(5)
        beside = own_stream(torch.Generator().manual_seed(5))
        assert isinstance(beside, torch.Generator)
        self.beside = beside
        self.abar = [float(a) for a in self.net.schedule.alpha(TIMES) ** 2]

    def levels(self, i: int) -> tuple[float, float, float]:
        """alpha-bar now and then, and the standard deviation of the fresh noise."""
        now, then = self.abar[i], self.abar[i + 1]
        if isinstance(self.base, FixedShare):  # "DDIM with eta 0.5" of FreeDoM's release
            return now, then, 0.5 * math.sqrt(1 - then)
        eta = 0.0 if self.base == DDIM(0) else 1.0
        return now, then, eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))

    def tweedie(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        eps = self.net.noise(x, float(TIMES[i]))
        return (x - math.sqrt(1 - self.abar[i]) * eps) / math.sqrt(self.abar[i]), eps

    def ddim(self, x0: Tensor, eps: Tensor, i: int) -> Tensor:
        _, then, std = self.levels(i)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then - std**2) * eps
        return x + std * self.normal() if std else x

    def normal(self) -> Tensor:
        return torch.randn(BATCH, 4, generator=self.draws, dtype=torch.float64)

    def back(self, x: Tensor, i: int) -> Tensor:
        now, then, _ = self.levels(i)
        return math.sqrt(now / then) * x + math.sqrt(1 - now / then) * self.normal()

    def run(self, move: Move, rounds: Callable[[int], int] = lambda i: 1) -> Tensor:
        x = NOISE
        for i, _ in enumerate(itertools.pairwise(TIMES)):
            for left in reversed(range(rounds(i))):
                x = move(self, x.detach().requires_grad_(), i).detach()
                if left:
                    x = self.back(x, i)
        return x


def plain_dps(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    return loop.ddim(x0, eps, i) - 0.4 * slope(distance(x0), x)


def plain_lgd(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    moved = loop.ddim(x0, eps, i)
    xi = torch.randn(BATCH, 3, 4, generator=loop.beside, dtype=torch.float64)
    near = x0[:, None] + math.sqrt(1 - loop.abar[i]) * xi
    likelihood = torch.exp(-distance(near, Y[:, None])).mean(1)
    return moved + 0.4 * slope(likelihood.log(), x)


def plain_freedom(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    step = 0.4 * math.sqrt(loop.abar[i])
    return loop.ddim(x0, eps, i) - step * slope(distance(x0), x)


def plain_freedom_rms(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    now, then, _ = loop.levels(i)
    g = slope(distance(x0), x)
    c1 = math.sqrt(then) * (1 - now / then) / (1 - now)
    size = 0.02 * 2 * (eps**2).mean(1, keepdim=True).sqrt() * math.sqrt((1 - now) / now) * c1
    return loop.ddim(x0, eps, i) - size / (g**2).mean(1, keepdim=True).sqrt() * g


def plain_mpgd(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    x0 = x0.detach().requires_grad_()
    return loop.ddim(x0 - 0.1 / math.sqrt(loop.abar[i]) * slope(distance(x0), x0), eps, i)


def plain_mpgd_rms(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    x0 = x0.detach().requires_grad_()
    g = slope(distance(x0), x0)
    size = 0.1 / math.sqrt(loop.abar[i + 1]) / (g**2).mean(1, keepdim=True).sqrt()
    return loop.ddim(x0 - size * g, eps, i)


def plain_universal(loop: Loop, x: Tensor, i: int) -> Tensor:
    signal, noise = math.sqrt(loop.abar[i]), math.sqrt(1 - loop.abar[i])
    x0, eps = loop.tweedie(x, i)
    eps = eps + 0.3 * noise * slope(distance(x0), x)
    best = x0.detach()
    for _ in range(3):
        best = best.detach().requires_grad_()
        best = best - 0.2 * slope(distance(best), best)
    eps = eps - signal / noise * (best - x0)
    return loop.ddim((x - noise * eps) / signal, eps, i)


def plain_tfg(loop: Loop, x: Tensor, i: int, schedule: str = "increase") -> Tensor:
    now, then, _ = loop.levels(i)
    kept = [a / b for a, b in itertools.pairwise(loop.abar)]
    size = {"increase": kept, "decrease": [1 - a for a in kept], "constant": [1.0] * len(kept)}
    weight = len(kept) * size[schedule][i] / sum(size[schedule])
    x0, eps = loop.tweedie(x, i)
    moved = loop.ddim(x0, eps, i)
    xi = torch.randn(BATCH, 2, 4, generator=loop.beside, dtype=torch.float64)

    def log_f(u: Tensor) -> Tensor:
        near = u[:, None] + 0.5 * math.sqrt(1 - now) * xi
        return torch.exp(-distance(near, Y[:, None])).mean(1).log()

    variance = 0.4 * weight * slope(log_f(x0), x)
    u = x0.detach()
    for _ in range(4):
        u = u.detach().requires_grad_()
        u = u + 0.1 * weight * slope(log_f(u), u)
    return moved + variance / math.sqrt(now / then) + math.sqrt(then) * (u - x0)


@dataclass(frozen=True)
class Stretch(Augmentor):
    """Random contrast of vectors: an augmentor that can be written in one line."""

    copies: int = 4
    numbers: int = 1

    def __call__(
        self, x: Tensor, target: Tensor | None, uniform: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return x * (0.5 + uniform), target


def plain_shen(loop: Loop, x: Tensor, i: int) -> Tensor:
    x0, eps = loop.tweedie(x, i)
    moved = loop.ddim(x0, eps, i)
    if TIMES[i] <= 300:
        return moved
    u = torch.special.ndtr(torch.randn(BATCH, 4, 1, generator=loop.beside, dtype=torch.float64))
    g = slope(distance(x0[:, None] * (0.5 + u), Y[:, None]).mean(1), x)
    size = 0.05 * eps.norm(dim=1, keepdim=True) / (g**2).sum(1, keepdim=True)
    return moved - size * g


def once(i: int) -> int:
    return 1


def in_the_middle(i: int) -> int:
    return 3 if 300 < TIMES[i] <= 800 else 1


MIDDLE = Recurrence(3, Window(300, 800))
CASES: dict[str, tuple[Guidance, Move, Callable[[int], int]]] = {
    "dps": (dps(ENERGY, 0.4), plain_dps, once),
    "lgd": (lgd_mc(ENERGY, 0.4, copies=3), plain_lgd, once),
    "freedom": (freedom(ENERGY, 0.4, recurrence=MIDDLE), plain_freedom, in_the_middle),
    "freedom_rms": (freedom(ENERGY, 2, "rms"), plain_freedom_rms, once),
    "mpgd": (mpgd(ENERGY, 0.1, "linear", MIDDLE), plain_mpgd, in_the_middle),
    "mpgd_rms": (mpgd(ENERGY, 0.1), plain_mpgd_rms, once),
    "universal": (universal(ENERGY, 0.3, 0.2, 3, repeats=2), plain_universal, lambda i: 2),
    "tfg": (tfg(ENERGY, 0.4, 0.1, 0.5, copies=2, repeats=2), plain_tfg, lambda i: 2),
    **{
        f"tfg_{schedule}": (
            tfg(ENERGY, 0.4, 0.1, 0.5, copies=2, repeats=2, schedule=schedule),
            partial(plain_tfg, schedule=schedule),
            lambda i: 2,
        )
        for schedule in ("decrease", "constant")
    },
    "shen": (
        augmented_polyak(ENERGY, 0.05, Stretch(), cap=None, window=Window(300), recurrence=MIDDLE),
        plain_shen,
        in_the_middle,
    ),
}


@pytest.mark.parametrize("base", [DDIM(0), DDIM(1), FixedShare(0.5)])
@pytest.mark.parametrize("name", CASES)
def test_a_method_is_the_loop_that_its_paper_describes(net: Any, name: str, base: BaseStep) -> None:
    guidance, move, rounds = CASES[name]
    expected = Loop(net, base).run(move, rounds)
    ours = guided_sample(
        net,
        NOISE,
        None,
        TIMES,
        guidance,
        Y,
        torch.Generator().manual_seed(5),
        base,
        largest_move=None,
    )
    torch.testing.assert_close(ours.samples, expected, rtol=0, atol=1e-10)
    unguided = Loop(net, base).run(lambda loop, x, i: loop.ddim(*loop.tweedie(x, i), i), rounds)
    assert (ours.samples - unguided).abs().max() > 1e-3

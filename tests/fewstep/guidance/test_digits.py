"""Guided digits, seen by a judge that shares no datum with the guide, over three divisions.

The prior is exact: a kernel density estimate of a third of the digits, whose posterior mean has a
closed form. Another third trains the guide, the last one the judge, a network of another kind. So
what goes wrong is guidance's doing and not the denoiser's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion import Cond, Prediction, VPSchedule
from fewstep.guidance import (
    Capped,
    ClassLabel,
    DiffAugment,
    Guidance,
    Polyak,
    Scheduled,
    freedom,
    guided_sample,
    plain_sample,
)
from fewstep.metrics.digit_classifier import DigitClassifier, digits, fit_classifier
from fewstep.metrics.digit_readers import Perceptron
from fewstep.metrics.judging import accuracy, nearest_distance_ratio
from fewstep.seeding import torch_generator

WIDTH, COUNT, STEPS, SEEDS = 0.3, 200, 50, (0, 1, 2)
LABELS = torch.arange(COUNT) % 10
SCHEDULE = VPSchedule("linear", 1e-4, 0.02, trajectory_end="clean")
VIEWS = DiffAugment(copies=10, brightness=0.2, cutout=0.25)


class KernelDensity:
    """The exact denoiser of data with Gaussian noise of standard deviation ``WIDTH``."""

    schedule = SCHEDULE

    def __init__(self, data: Tensor, labels: Tensor) -> None:
        self.data, self.labels = data.flatten(1), labels

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        x = x_t.flatten(1)
        alpha, sigma = self.schedule.levels(t, x)
        variance = (alpha * WIDTH).square() + sigma.square()
        near = alpha * (x @ self.data.T) - 0.5 * alpha.square() * self.data.square().sum(1)
        if cond is not None:
            near = near.masked_fill(cond["labels"][:, None] != self.labels, -torch.inf)
        centre = (near / variance).softmax(1) @ self.data
        x0 = centre + alpha * WIDTH**2 / variance * (x - alpha * centre)
        return Prediction(x0.view_as(x_t), ((x - alpha * x0) / sigma).view_as(x_t))


@torch.enable_grad()
def off_the_shelf(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A classifier that was trained on clean data until it had learnt them, and on nothing else."""
    generator = torch_generator(seed, "guide")
    torch.manual_seed(seed)
    network = Perceptron()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(60):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


class Division(NamedTuple):
    """A division of the digits in three, and what was made of each."""

    prior: KernelDensity
    guide: nn.Module
    judge: nn.Module
    data: Tensor
    held_out: Tensor
    seed: int


@cache
def division(seed: int) -> Division:
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch_generator(seed, "thirds"))
    (a, b, c) = order.chunk(3)
    torch.manual_seed(seed)
    judge = DigitClassifier()
    fit_classifier(judge, images[c], labels[c], torch_generator(seed, "judge"))
    guide = off_the_shelf(images[b], labels[b], seed)
    prior = KernelDensity(images[a], labels[a])
    return Division(prior, guide, judge.eval(), images[a], images[c], seed)


class Verdict(NamedTuple):
    """Shares of samples that show their class, and their distance from data."""

    guide: float
    judge: float
    distance: float

    @property
    def gap(self) -> float:
        return self.guide - self.judge


@torch.no_grad()
def verdict(given: Division, samples: Tensor) -> Verdict:
    said = [accuracy(network(samples), LABELS) for network in (given.guide, given.judge)]
    distance = nearest_distance_ratio(samples, given.data, given.held_out)
    return Verdict(float(said[0]), float(said[1]), float(distance))


def noise(given: Division) -> Tensor:
    return torch.randn(COUNT, 1, 8, 8, generator=torch_generator(given.seed, "noise"))


@cache
def guided(seed: int, method: str) -> Verdict:
    given = division(seed)
    energy = ClassLabel(given.guide)
    guidance = {
        "plain": Guidance(energy, Scheduled(4.0, "score")),
        "views": Guidance(energy, Scheduled(4.0, "score"), augmentor=VIEWS),
        "weak": freedom(energy, 0.1),
        "capped": Guidance(energy, Capped(Polyak(0.1, "eps_norm"), 0.1)),
        "uncapped": Guidance(energy, Polyak(0.1, "eps_norm")),
    }[method]
    run = guided_sample(
        given.prior,
        noise(given),
        None,
        SCHEDULE.spaced_times(STEPS),
        guidance,
        LABELS,
        torch_generator(seed, "walk"),
        largest_move=None if method == "uncapped" else 10.0,
    )
    return verdict(given, run.samples)


@cache
def reference(seed: int, told: bool) -> Verdict:
    """Without guidance, or from the exact conditional denoiser."""
    given = division(seed)
    cond = {"labels": LABELS} if told else None
    run = plain_sample(given.prior, noise(given), cond, SCHEDULE.spaced_times(STEPS))
    return verdict(given, run.samples)


pytestmark = pytest.mark.slow
each_division = pytest.mark.parametrize("seed", SEEDS)


@each_division
def test_the_exact_conditional_shows_what_was_asked_and_nothing_else_does_by_chance(
    seed: int,
) -> None:
    free, told = reference(seed, False), reference(seed, True)
    assert max(free.guide, free.judge) < 0.2
    assert min(told.guide, told.judge) > 0.88
    assert told.distance == pytest.approx(free.distance, rel=0.1)


@each_division
def test_a_gradient_can_convince_the_guide_and_not_the_judge(seed: int) -> None:
    """FreeDoM's rule at a small strength: measured gaps are 0.10 and more, those of the score form
    at strength 4 up to 0.03."""
    weak, plain = guided(seed, "weak"), guided(seed, "plain")
    assert weak.guide > 0.95
    assert weak.gap > 0.05
    assert weak.gap > plain.gap + 0.03
    # Their distance from data does not tell them: they look like digits, and like the wrong ones.
    assert weak.distance < 1.2 * reference(seed, False).distance


@each_division
def test_guide_and_judge_can_agree_on_samples_that_have_left_the_data(seed: int) -> None:
    capped = guided(seed, "capped")
    assert min(capped.guide, capped.judge) > 0.95
    assert capped.distance > 1.4 * reference(seed, False).distance


@each_division
def test_the_published_polyak_step_without_a_cap_diverges_on_a_cross_entropy(seed: int) -> None:
    assert guided(seed, "uncapped").distance > 100


def test_random_views_keep_samples_nearer_to_data_at_the_same_strength() -> None:
    """What does not hold here: that they lower the gap. At strength 4 there is hardly any to lower
    (0.005 to 0.035 with views, 0.015 to 0.03 without, where one sample of 200 is 0.005)."""
    views, plain = ([guided(seed, method) for seed in SEEDS] for method in ("views", "plain"))
    assert all(v.distance < p.distance for v, p in zip(views, plain, strict=True))
    assert min(v.judge for v in views) > 0.9

"""Classifiers of 8 x 8 digits that have seen no digit in common: to guide, to tune and to judge.

A classifier that steers samples cannot judge them, and one by whose verdicts a strength was chosen
cannot either. So the 1,797 digits are divided in three, and each part trains a network of its own.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.metrics.digit_classifier import (
    DigitClassifier,
    cache_folder,
    digits,
    fetch_classifier,
    fit_classifier,
    store_classifier,
)
from fewstep.seeding import torch_generator

logger = logging.getLogger(__name__)

Part = Literal["guide", "judge", "tuner"]
PARTS: tuple[Part, ...] = ("guide", "judge", "tuner")
VERSION = 1


class Perceptron(nn.Sequential):
    """Fully connected classifier of 8 x 8 digits, ``(B, 1, 8, 8)`` in [-1, 1] to ``(B, 10)``.

    Args:
        width: of its two hidden layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 10),
        )


def part_of_digits(part: Part) -> tuple[Tensor, Tensor]:
    """599 digits ``(599, 1, 8, 8)`` in [-1, 1], and their labels; parts are disjoint."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch_generator(0, "digit-parts"))
    rows = order[PARTS.index(part) :: len(PARTS)]
    return images[rows], labels[rows]


def digit_reader(part: Part, cache: str | None = None) -> nn.Module:
    """A classifier of digits, trained on a third of them in seconds on first use and cached.

    The guide and the tuner are fully connected, the judge is convolutional.

    Args:
        part: ``guide`` steers, ``tuner`` may choose how strongly, ``judge`` does neither.
        cache: folder of the trained networks; ``$FEWSTEP_CACHE`` or ``~/.cache/fewstep`` by
            default.

    Raises:
        FewstepError: if the cached file is damaged.
    """
    path = cache_folder(cache) / f"digit_{part}_v{VERSION}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PARTS.index(part))
        network = DigitClassifier() if part == "judge" else Perceptron()
    if not path.exists():
        logger.info("Training the digits' %s on its third of the digits (once) ...", part)
        fit_classifier(network, *part_of_digits(part), torch_generator(0, f"digit-{part}"))
        store_classifier(network, path)
    fetch_classifier(network, path)
    return network

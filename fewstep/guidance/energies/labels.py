"""Energies of classes and rewards: what a network says of a sample in a number or a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, needed, settled


@dataclass(frozen=True, eq=False)
class ClassLabel(Energy):
    """Cross-entropy of a classifier; the target is the class ``(N,)`` of each sample.

    Args:
        classifier: takes clean samples and returns logits ``(N, classes)``; in evaluation mode,
            since in training mode batch statistics tie samples together.
        shift, factor: the classifier sees ``(x0 + shift) * factor``; 1 and 0.5 turn [-1, 1] into
            [0, 1]. A :class:`PretrainedClassifier` needs neither.
    """

    classifier: nn.Module
    shift: float = 0.0
    factor: float = 1.0

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        labels = needed(target, self, "the class label of each sample", x0)
        classifier = settled(self.classifier, self, x0)
        logits = classifier((x0 + self.shift) * self.factor)
        return F.cross_entropy(logits, labels.long(), reduction="none")


@dataclass(frozen=True, eq=False)
class Reward(Energy):
    """A differentiable reward, to be made large.

    Args:
        network: gives rewards ``(N,)`` or ``(N, 1)`` of clean samples, and is called with the
            target ``(N, ...)`` too where there is one.
        goal: the energy is how far the reward is below it, and nothing is gained beyond; without
            a goal it is minus the reward.
        minimum: lower bound of minus the reward, which only the genuine Polyak step asks for. With
            a goal it is 0.
    """

    network: nn.Module
    goal: float | None = None
    minimum: float | None = None

    def __post_init__(self) -> None:
        if self.goal is None:
            return
        if self.minimum:
            raise FewstepError(
                "A Reward with a goal has its minimum at 0; leave out goal or minimum."
            )
        object.__setattr__(self, "minimum", 0.0)  # frozen

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        network = settled(self.network, self, x0)
        given = (x0,) if target is None else (x0, needed(target, self, "a row for each sample", x0))
        reward: Tensor = network(*given)
        if reward.ndim == 2 and reward.shape[1] == 1:
            reward = reward[:, 0]
        return -reward if self.goal is None else F.relu(self.goal - reward)

"""Tuners: judges that may choose a strength, and so may not measure what came of it.

A tuner is neither the guide nor the judge that results are reported by: chosen by the guide's
opinion a strength rewards samples that fool it, and a judge that chose cannot be asked again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.energies import Energy, Target
from fewstep.guidance.judge import Judge


@dataclass(frozen=True)
class ClassTuner(Judge):
    """The probability that a classifier gives to the class that was wanted, from 0 to 1.

    Unlike a logarithm it is not ruled by a few samples, and unlike accuracy it tells two
    configurations apart by few of them.

    Args:
        classifier: takes samples ``(N, ...)`` and gives logits ``(N, classes)``.
        shift, factor: it sees ``(x0 + shift) * factor``; 1 and 0.5 turn [-1, 1] into [0, 1].
    """

    classifier: nn.Module
    shift: float = 0.0
    factor: float = 1.0

    @torch.no_grad()
    def __call__(self, samples: Tensor, target: Target) -> Tensor:
        if not isinstance(target, Tensor) or target.is_floating_point() or target.ndim != 1:
            raise FewstepError(
                "ClassTuner takes the number of a class for each sample; set steering.target to "
                "the condition that has it, such as class_labels."
            )
        logits = self.classifier.to(samples.device).eval()((samples + self.shift) * self.factor)
        chosen = target.to(logits.device)[:, None]
        found: Tensor = logits.double().softmax(1).gather(1, chosen)[:, 0]
        return found


@dataclass(frozen=True)
class EnergyTuner(Judge):
    """Minus a loss of clean samples, such as a distance between captions and pictures.

    Args:
        energy: with another network, or other data, than the guide's.
    """

    energy: Energy

    @torch.no_grad()
    def __call__(self, samples: Tensor, target: Target) -> Tensor:
        return -self.energy(samples, target)

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """What the energy compares of pictures ``(N, C, H, W)`` in [-1, 1], ``(N, ...)``.

        Raises:
            FewstepError: if it compares nothing of them.
        """
        encode = getattr(self.energy, "encode_images", None)
        if encode is None:
            raise FewstepError(
                f"steering.pictures is true, but the tuner's {type(self.energy).__name__} compares "
                "nothing of pictures. Give a tuner that does."
            )
        return torch.cat([encode(some) for some in pictures.split(32)])

    def encode(self, prompts: list[str]) -> Tensor:
        """Captions as the energy knows them, ``(B, ...)``.

        Raises:
            FewstepError: if it reads none.
        """
        encode = getattr(self.energy, "encode", None)
        if encode is None:
            raise FewstepError(
                f"steering.target is prompt, but the tuner's {type(self.energy).__name__} reads "
                "no captions. Give a tuner that does."
            )
        found: Tensor = encode(prompts)
        return found

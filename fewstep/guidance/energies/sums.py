"""Energies made of others: weighted sums, and means over a video's frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, repeated


@dataclass(frozen=True, eq=False)
class Sum(Energy):
    """A weighted sum of energies, each known by a name.

    The target is a mapping from these names to the parts' own targets; a part that needs none may
    be left out. A sum is a part like any other, and its target a mapping within the mapping.

    Args:
        parts: the energies.
        weights: of the parts, above 0; 1 for those left out.

    Raises:
        FewstepError: if weights and parts do not agree, or a part decodes latents by itself.
    """

    parts: Mapping[str, Energy]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(self.parts))
        if not self.parts or unknown or min(self.weights.values(), default=1.0) <= 0:
            raise FewstepError(
                f"A Sum of {', '.join(self.parts) or 'nothing'} needs one part or more, and weights"
                f" above 0 for these only; got {dict(self.weights)}."
            )
        for part in self.parts.values():
            _refuse_decoding(part, self)

    def weight(self, name: str) -> float:
        """Of a part."""
        return self.weights.get(name, 1.0)

    @property
    def minimum(self) -> float:
        """The weighted sum of the parts' lower bounds."""
        return math.fsum(self.weight(name) * part.minimum for name, part in self.parts.items())

    def losses(self, x0: Tensor, target: Target) -> dict[str, Tensor]:
        """Each part's losses ``(N,)``, without its weight."""
        if isinstance(target, Tensor):
            raise FewstepError(
                "The target of a Sum is a mapping from its parts' names "
                f"({', '.join(self.parts)}) to their targets, not one tensor."
            )
        given = target or {}
        if unknown := sorted(set(given) - set(self.parts)):
            raise FewstepError(
                f"The Sum has no part '{unknown[0]}'; its parts are {', '.join(self.parts)}."
            )
        return {name: part(x0, given.get(name)) for name, part in self.parts.items()}

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        found = self.losses(x0, target)
        for name, loss in found.items():
            if loss.shape != (len(x0),):
                raise FewstepError(
                    f"The part '{name}' of a Sum returned losses of shape {tuple(loss.shape)} for "
                    f"{len(x0)} samples; an energy returns one for each sample."
                )
        weighted = [self.weight(name) * loss for name, loss in found.items()]
        return torch.stack(weighted).sum(0)


@dataclass(frozen=True, eq=False)
class EachFrame(Energy):
    """The mean over frames of an energy of pictures, for videos ``(N, C, F, H, W)``.

    The target is a picture energy's, and all frames of a video have the same.
    """

    energy: Energy

    def __post_init__(self) -> None:
        _refuse_decoding(self.energy, self)

    @property
    def minimum(self) -> float:
        return self.energy.minimum

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        if x0.ndim != 5:
            raise FewstepError(
                f"EachFrame looks at videos (N, C, F, H, W), not at shape {tuple(x0.shape)}."
            )
        count = x0.shape[2]
        frames = x0.permute(2, 0, 1, 3, 4).flatten(0, 1)  # all first frames, all second ones, ...
        losses = self.energy(frames, repeated(target, count))
        return losses.unflatten(0, (count, len(x0))).mean(0)


def _refuse_decoding(part: Energy, whole: Energy) -> None:
    """Refuses a part that decodes latents: views would be made of these, or decoded many times."""
    if part.staged()[1] is not part:
        kind = type(whole).__name__
        raise FewstepError(
            f"A {kind} has a part that decodes latents by itself. Decode once, before it: "
            f"Decoded({kind}(...)) instead of {kind}(Decoded(...))."
        )

"""Energies made of others: weighted sums, and means over a video's frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, repeated

Reader = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Sum(Energy):
    """A weighted sum of energies, each known by a name.

    The target is a mapping from these names to the parts' own targets; a part that needs none may
    be left out. A sum is a part like any other, and its target a mapping within the mapping.

    Args:
        parts: the energies.
        weights: of the parts, above 0; 1 for those left out.
        told: the part that a target which is one tensor is for, where no other needs any. In
            experiments that is what ``steering.target`` names, captions and pictures included.

    Raises:
        FewstepError: if weights, parts and ``told`` do not agree, or a part decodes latents by
            itself.
    """

    parts: Mapping[str, Energy]
    weights: Mapping[str, float] = field(default_factory=dict)
    told: str | None = None

    def __post_init__(self) -> None:
        if self.told is not None and self.told not in self.parts:
            raise FewstepError(
                f"The Sum's `told` is '{self.told}', which is no part of it; its parts are "
                f"{', '.join(self.parts)}."
            )
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
    def minimum(self) -> float | None:
        """The weighted sum of the parts' lower bounds; None if one of them has none."""
        bounds = {name: part.minimum for name, part in self.parts.items()}
        known = [self.weight(name) * x for name, x in bounds.items() if x is not None]
        return math.fsum(known) if len(known) == len(bounds) else None

    def losses(self, x0: Tensor, target: Target) -> dict[str, Tensor]:
        """Each part's losses ``(N,)``, without its weight."""
        if isinstance(target, Tensor) and self.told is None:
            raise FewstepError(
                "The target of a Sum is a mapping from its parts' names "
                f"({', '.join(self.parts)}) to their targets, not one tensor. Set `told` to the "
                "part that it is for."
            )
        given = {str(self.told): target} if isinstance(target, Tensor) else target or {}
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

    @property
    def encode(self) -> Reader:
        """Of captions, as the part reads them that is told the target; none has it elsewhere."""
        return _reader(self.parts.get(str(self.told)), "encode")

    @property
    def encode_images(self) -> Reader:
        """The same of pictures."""
        return _reader(self.parts.get(str(self.told)), "encode_images")


@dataclass(frozen=True, eq=False)
class EachFrame(Energy):
    """The mean over frames of an energy of pictures, for videos ``(N, C, F, H, W)``.

    The target is a picture energy's, and all frames of a video have the same.
    """

    energy: Energy

    def __post_init__(self) -> None:
        _refuse_decoding(self.energy, self)

    @property
    def minimum(self) -> float | None:
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

    @property
    def encode(self) -> Reader:
        """Of captions, as the energy of pictures reads them, if it does."""
        return _reader(self.energy, "encode")

    @property
    def encode_images(self) -> Reader:
        """The same of pictures."""
        return _reader(self.energy, "encode_images")


def _reader(energy: Energy | None, name: str) -> Reader:
    """What makes targets of captions or pictures; :class:`AttributeError` where nothing does."""
    found: Reader = getattr(energy, name)
    return found


def _refuse_decoding(part: Energy, whole: Energy) -> None:
    """Refuses a part that decodes latents: views would be made of these, or decoded many times."""
    if part.staged()[1] is not part:
        kind = type(whole).__name__
        raise FewstepError(
            f"A {kind} has a part that decodes latents by itself. Decode once, before it: "
            f"Decoded({kind}(...)) instead of {kind}(Decoded(...))."
        )

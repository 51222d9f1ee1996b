"""What an energy is: a loss of clean samples, one number for each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError

Target: TypeAlias = "Tensor | Mapping[str, Target] | None"
"""What is wanted of each sample: ``(N, ...)``, or for a sum of energies one such for each part."""


class Energy(ABC):
    """A loss of clean samples.

    Samples are in the data's own range, pixels in [-1, 1]. What is wanted comes with every call as
    ``target``, a row for each sample, so that one energy serves all batches.
    """

    @property
    def minimum(self) -> float | None:
        """The loss's lower bound, which the genuine Polyak step needs; None if it is not known."""
        return 0.0

    @abstractmethod
    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        """Losses ``(N,)``.

        Args:
            x0: clean samples ``(N, ...)``; ``N`` is a multiple of the batch when there are several
                views of each sample.
            target: what is wanted, ``(N, ...)``, or None if the energy needs none.
        """

    def staged(self) -> tuple[Callable[[Tensor], Tensor], Energy]:
        """What is done once to each sample, and the energy of what comes of it.

        Random views are made in between, so that a sample is decoded once for all of them.
        """
        return _as_it_is, self


def _as_it_is(x0: Tensor) -> Tensor:
    return x0


def needed(target: Target, energy: object, what: str, like: Tensor) -> Tensor:
    """The target of an energy that cannot do without, ``(N, ...)``, where the samples are.

    Args:
        what: it is, for the error.
        like: the samples.

    Raises:
        FewstepError: if there is none, or those of several energies were given.
    """
    if isinstance(target, Tensor):
        return target.to(like.device)
    given = "" if target is None else f", not a mapping with {', '.join(target)}"
    raise FewstepError(f"{type(energy).__name__} needs a target: {what}{given}.")


def repeated(target: Target, times: int) -> Target:
    """Targets ``(times N, ...)`` of so many views of each sample."""
    if isinstance(target, Tensor):
        return target.repeat(times, *[1] * (target.ndim - 1))
    if target is None:
        return None
    return {name: repeated(part, times) for name, part in target.items()}


def row_counts(target: Target) -> Iterator[int]:
    """For how many samples each part of a target is."""
    if isinstance(target, Tensor):
        yield len(target)
    elif target is not None:
        for part in target.values():
            yield from row_counts(part)


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample ``(N,)``, with a gradient of zero at zero."""
    return safe_length(x.flatten(1))


def safe_length(x: Tensor) -> Tensor:
    """Euclidean length of vectors ``(..., D)``, with a gradient of zero at zero."""
    square = x.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def apart(found: Tensor, wanted: Tensor, form: Literal["cosine", "l2"]) -> Tensor:
    """Distances ``(N,)`` of embeddings ``(N, D)``: 1 minus their cosine, or Euclidean."""
    wanted = wanted.to(found)
    if form == "l2":
        return safe_norm(found - wanted)
    return 1 - torch.cosine_similarity(found, wanted, dim=1)


def settled(network: nn.Module, energy: object, like: Tensor) -> nn.Module:
    """A network where the samples are.

    Raises:
        FewstepError: if it is in training mode.
    """
    if network.training:
        raise FewstepError(
            f"The {type(network).__name__} of a {type(energy).__name__} energy is in training "
            "mode, where samples may depend on their batch mates. Call network.eval() first."
        )
    weight = next(network.parameters(), None)
    return network if weight is None or weight.device == like.device else network.to(like.device)

"""The few shapes that modules, datamodules and callbacks agree on; none of them imports another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor


class Batch(TypedDict):
    """What a datamodule yields.

    Attributes:
        sample: pixels in [-1, 1] or latents, ``(B, C, H, W)`` or ``(B, C, F, H, W)``.
        cond: conditioning under the backbone's own argument names, each ``(B, ...)``.
        key: which sample each one is.
        prompt: captions, where text is encoded on the fly.
        source: which part of a mixed data set the batch is from.
        skipped: records that could not be decoded and are missing from this batch, and why.
        notes: what else a datamodule counts about records, such as clips that were too short.
        failed: an error that a loading process met; the datamodule raises it.
    """

    sample: Tensor
    cond: dict[str, Tensor]
    key: list[str]
    prompt: NotRequired[list[str]]
    source: NotRequired[str]
    skipped: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    failed: NotRequired[str]


@runtime_checkable
class FewStepSampler(Protocol):
    """The only thing callbacks know of a method.

    Attributes:
        sample_shape: shape of one sample, without the batch dimension.
    """

    sample_shape: tuple[int, ...]

    def sample(
        self,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        """Turns noise into samples in ``num_steps`` network evaluations."""

    def decode(self, x0: Tensor) -> Tensor:
        """Turns samples into pixels in [-1, 1] (or whatever the data set holds)."""

    def sampling_roles(self) -> list[str]:
        """Roles that can sample, the default one first."""

    def guidance_scale(self, role: str | None = None) -> float:
        """The guidance scale a role samples with; 1 is off."""

    def step_counts(self, role: str | None = None) -> list[int]:
        """The numbers of sampling steps to measure a role at, unless told otherwise."""

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, guidance included."""


@runtime_checkable
class ReferenceData(Protocol):
    """What callbacks ask of a datamodule: a finite pass over the data metrics compare with."""

    def reference_batches(self) -> Iterable[Batch]:
        """Every reference sample once, in a fixed order."""

    def reference_protocol(self) -> dict[str, Any]:
        """Which data that is, in plain values, for the record of a result."""

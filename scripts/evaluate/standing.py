"""A stand-in for a method, where something else has made or makes the samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor


class StandIn(pl.LightningModule):
    """Has no parameters, is never trained, and samples in one role.

    Args:
        role: what the samples are called in results.
        steps: sampling step counts.
        guidance: guidance scale that results record; at most 1 is off.
    """

    def __init__(self, role: str, steps: list[int], guidance: float) -> None:
        super().__init__()
        self.role = role
        self.steps = steps
        self.guidance = guidance

    def sampling_roles(self) -> list[str]:
        """The one role."""
        return [self.role]

    def step_counts(self, role: str | None = None) -> list[int]:
        """As given."""
        return self.steps

    def guidance_scale(self, role: str | None = None) -> float:
        """As given."""
        return self.guidance

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, guidance included."""
        return num_steps * (2 if self.guidance > 1 else 1)

    def decode(self, x0: Tensor) -> Tensor:
        """Samples are pixels already."""
        return x0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There is no loss to validate."""

    def sample_source(self) -> dict[str, Any]:
        """Which samples these are, so that results of others are not mixed with theirs."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """There is nothing to shard; strategies that shard ask for this method."""

    def configure_optimizers(self) -> None:
        """There is nothing to train."""

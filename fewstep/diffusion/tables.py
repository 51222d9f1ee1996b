"""Constant tables that follow their user's device but never its dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Table:
    """A float64 or integer constant with one cached copy a device.

    Not a buffer on purpose: ``module.to(bfloat16)`` would round train index 999 to 1000.
    The cache means that a training step never copies from the host.
    """

    def __init__(self, values: Tensor | Sequence[float] | Sequence[int]) -> None:
        home = torch.as_tensor(values).detach().cpu()
        self.home = home.double() if home.is_floating_point() else home
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device | str) -> Tensor:
        """The table on ``device``; float32 where the device has no float64 (Apple's MPS)."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.home
        if device not in self._copies:
            narrow = self.home.is_floating_point() and device.type == "mps"
            self._copies[device] = self.home.to(device, torch.float32 if narrow else None)
        return self._copies[device]

    def __deepcopy__(self, memo: dict[int, object]) -> Table:
        return self  # constant, so shared

    def __getstate__(self) -> dict[str, object]:
        return {"home": self.home, "_copies": {}}


def expand_to(values: Tensor, x: Tensor) -> Tensor:
    """Reshapes ``values (B,)`` to ``(B, 1, ..., 1)`` so that it broadcasts over ``x (B, ...)``."""
    return values.reshape(-1, *([1] * (x.ndim - 1)))


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype jumps and losses are computed in: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

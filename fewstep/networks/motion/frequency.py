"""Slow and fast parts of a video, by FreeInit's filter over time and space."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.tables import Table, work_dtype
from fewstep.errors import FewstepError
from fewstep.networks.motion.base import MotionRepresentation


class LowFrequency(MotionRepresentation):
    """The low-pass part of a video, by a Butterworth filter over ``(F, H, W)`` (Wu et al. 2023).

    The filter's gain at a frequency ``(f, h, w)``, in units of the highest one, is
    ``1 / (1 + (d^2 / stop_spatial^2)^order)`` with
    ``d^2 = (stop_spatial / stop_temporal * f)^2 + h^2 + w^2``; 1 for a constant.

    Args:
        stop_spatial, stop_temporal: frequencies at which the gain is a half, in that unit.
        order: how sharply it falls.
    """

    def __init__(
        self, stop_spatial: float = 0.25, stop_temporal: float = 0.25, order: int = 4
    ) -> None:
        super().__init__()
        if stop_spatial <= 0 or stop_temporal <= 0 or order < 1:
            raise FewstepError(
                f"{type(self).__name__} needs stop_spatial and stop_temporal above 0 and an order "
                f"of at least 1, not {stop_spatial}, {stop_temporal} and {order}."
            )
        self.stop_spatial = stop_spatial
        self.stop_temporal = stop_temporal
        self.order = order

    def build(self, channels: int, frames: int, height: int, width: int) -> None:
        # Distances are from the constant part, so that it passes for odd sizes too; for even ones
        # this is FreeInit's mask.
        stretch = self.stop_spatial / self.stop_temporal
        time = 2 * torch.fft.fftfreq(frames, dtype=torch.float64, device="cpu") * stretch
        rows = 2 * torch.fft.fftfreq(height, dtype=torch.float64, device="cpu")
        # A real video's spectrum is symmetric, as is the filter: half of it says all.
        columns = 2 * torch.fft.rfftfreq(width, dtype=torch.float64, device="cpu")
        squares = time[:, None, None] ** 2 + rows[:, None] ** 2 + columns**2
        low_pass = 1 / (1 + (squares / self.stop_spatial**2) ** self.order)
        self._gain = Table(self.gain(low_pass))

    def gain(self, low_pass: Tensor) -> Tensor:
        """The filter's gain ``(F, H, W // 2 + 1)``, from that of the low-pass filter."""
        return low_pass

    def forward(self, video: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` in float32, or float64 for float64 input."""
        dtype = work_dtype(video)  # half precision knows no transforms of most sizes
        spectrum = torch.fft.rfftn(video.to(dtype), dim=(-3, -2, -1))
        gain = self._gain.on(video.device).to(dtype)
        return torch.fft.irfftn(spectrum * gain, s=video.shape[-3:], dim=(-3, -2, -1))


class HighFrequency(LowFrequency):
    """What :class:`LowFrequency` leaves out: its gain is one minus the other's."""

    invariances = frozenset({"channel_constant"})

    def gain(self, low_pass: Tensor) -> Tensor:
        return 1 - low_pass

"""Where metrics compute, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Float32 throughout, whatever the run around it trades for speed.

    Autocast is off, and neither TF32 nor bfloat16 stands in for float32 within convolutions and
    matrix products. Afterwards everything is as it was.

    Args:
        device: whose autocast is meant.
    """
    backends: Any = torch.backends  # its parts are not all declared
    switches = (
        backends.cudnn.conv,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, found in zip(switches, before, strict=True):
            switch.fp32_precision = found


def compute_device() -> torch.device:
    """The GPU if this process uses one already, otherwise the CPU."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

"""Where metrics compute, and how exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    # PyTorch has an older way to say the same, and refuses to answer where the two disagree.
    products = _unless_mixed(torch.get_float32_matmul_precision)
    convolutions = _unless_mixed(lambda: bool(backends.cudnn.allow_tf32))
    before = [switch.fp32_precision for switch in switches]
    _choose_the_older_way(
        None if products is None else "highest", None if convolutions is None else False
    )
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _choose_the_older_way(products, convolutions)  # which moves the switches too
        for switch, found in zip(switches, before, strict=True):
            switch.fp32_precision = found


def _unless_mixed(read: Callable[[], T]) -> T | None:
    """A setting in PyTorch's older way; None where the run has used the newer one instead."""
    try:
        return read()
    except RuntimeError:
        return None


def _choose_the_older_way(products: str | None, convolutions: bool | None) -> None:
    """Leaves alone what is None."""
    backends: Any = torch.backends
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        backends.cudnn.allow_tf32 = convolutions


def compute_device() -> torch.device:
    """The GPU if this process uses one already, otherwise the CPU."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

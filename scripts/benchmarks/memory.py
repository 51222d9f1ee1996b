"""How much memory a rank needs at most, on a GPU or of its process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEANING = {
    "cuda": "peak of torch.cuda.max_memory_allocated during the first block of steps",
    "cpu": "peak resident memory of the rank's process during the first block of steps, above its "
    "resident memory before the networks were built",
}


class PeakMemory:
    """The peak since :meth:`restart`, above what was there when this was made.

    Where there is no ``/proc`` a process's peak cannot be set back: there, what building the
    networks took is part of it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device != "cuda":
            _give_back()  # or what is freed later would count as less than nothing
        self.before = 0 if device == "cuda" else _resident("VmRSS")

    def restart(self) -> None:
        """Forgets the peak so far; what was freed goes back to the system first."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        _give_back()
        if sys.platform == "linux":
            with suppress(OSError):
                CLEAR.write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - self.before


def _give_back() -> None:
    """Returns freed memory to the system."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(entry: str) -> int:
    if STATUS.is_file():
        (line,) = (one for one in STATUS.read_text().splitlines() if one.startswith(entry))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def local_bytes(tensors: Iterable[object]) -> int:
    """Bytes of tensors on this rank: of sharded ones, the shard's."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local if isinstance(t, Tensor))

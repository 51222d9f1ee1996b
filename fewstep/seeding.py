"""Random numbers as a pure function of (seed, what for, when, where).

A generator made anew for every update needs no saved state: a resumed run draws what the
undisturbed one would have drawn, and seeding a CUDA generator does not synchronise.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derived_seed(seed: int, stream: str, *counters: int) -> int:
    """Mixes a run's seed, a stream's name and counters (update, rank, ...) into 63 bits."""
    entropy = [seed, zlib.crc32(stream.encode()), *counters]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(
    seed: int, stream: str, *counters: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator on ``device``, a pure function of its arguments."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, stream, *counters))


def numpy_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A NumPy generator, a pure function of its arguments."""
    return np.random.default_rng(derived_seed(seed, stream, *counters))

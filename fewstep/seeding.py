"""Random numbers as a pure function of (seed, what for, when, where).

A generator made anew for every update needs no saved state: a resumed run draws what the
undisturbed one would have drawn, and seeding a CUDA generator does not synchronise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one for each of its samples; None is torch's global one."""


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


@contextmanager
def global_generators(
    seed: int, stream: str, *counters: int, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Makes torch's global generators a pure function of the arguments meanwhile.

    For layers that take no generator, such as dropout. These are the CPU's generator and that of
    ``device`` where it is CUDA's; both go on afterwards as if nothing had been drawn. Their states
    are kept on the host, so nothing here waits for the device.
    """
    device, number = torch.device(device), derived_seed(seed, stream, *counters)
    indices: list[int] = []
    if device.type == "cuda":
        indices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=indices):
        torch.default_generator.manual_seed(number)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(number)
        yield


def normal_like(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers in the shape ``(B, ...)``, type and place of ``like``.

    With a generator for each sample, on the CPU, a sample's numbers depend on nothing else: not on
    the batch it is in, nor on the device or the number of ranks.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    drawn = [torch.randn(like.shape[1:], generator=one, dtype=like.dtype) for one in generator]
    return torch.stack(drawn).to(like.device, non_blocking=True)

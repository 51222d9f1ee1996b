"""How varied generated samples are: between seeds, between conditions, beside real ones.

A collapsed generator gives the same sample for all seeds, or for all prompts. With one clip a
device no batch shows it, so variances are put together from means over all ranks: of a few random
projections of each sample, and of their squares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.tables import work_dtype
from fewstep.seeding import torch_generator

PROJECTIONS = 16
MARK = "moment "  # of means that are not logged themselves


def projected(x: Tensor) -> Tensor:
    """Random projections ``(B, 16)`` of samples ``(B, ...)``, always the same ones.

    Each element goes to one of them with a random sign, so that the variances' sum is, on average
    over the signs, the variance of an element.
    """
    flat = x.detach().to(work_dtype(x)).flatten(1)
    size = flat.shape[1]
    generator = torch_generator(0, "spread", device=x.device)
    signs = torch.randint(2, (size,), generator=generator, device=x.device) * 2 - 1
    padded = F.pad(flat * signs, (0, -size % PROJECTIONS))
    return padded.unflatten(1, (-1, PROJECTIONS)).sum(1) / size**0.5


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Means over samples from which :func:`spreads` makes their variance."""
    values = projected(x)
    found = {f"{MARK}{name} square": values.square().sum(1).mean()}
    for number, mean in enumerate(values.mean(0).unbind()):
        found[f"{MARK}{name} {number}"] = mean
    return found


def between_seeds(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Half the mean squared difference of samples made from two seeds each."""
    difference = projected(first - second)
    return {f"{MARK}seeds": 0.5 * difference.square().sum(1).mean()}


def spreads(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the moments among means over all samples by variances, in units of the real data's.

    ``spread`` is that of generated samples, near 1 where it is right; it is the sum of
    ``seed_spread``, between seeds of the same condition, and ``prompt_spread``, between conditions.
    """
    logs = {name: value for name, value in means.items() if not name.startswith(MARK)}
    if f"{MARK}seeds" not in means:
        return logs
    unit = _variance("real", means).clamp_min(torch.finfo(torch.float32).tiny)
    logs["spread"] = _variance("fake", means) / unit
    logs["seed_spread"] = means[f"{MARK}seeds"] / unit
    logs["prompt_spread"] = logs["spread"] - logs["seed_spread"]
    return logs


def _variance(name: str, means: dict[str, Tensor]) -> Tensor:
    projections = torch.stack([means[f"{MARK}{name} {n}"] for n in range(PROJECTIONS)])
    return means[f"{MARK}{name} square"] - projections.square().sum()

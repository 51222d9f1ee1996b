"""The processes that measure one set of samples together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Sums and gathers over ranks, which may hold any number of samples, none included.

    Args:
        device: that collectives run on: the GPU under NCCL.
        alone: whether this process measures by itself although there are others.
    """

    def __init__(self, device: torch.device | str = "cpu", alone: bool = False) -> None:
        self.device = torch.device(device)
        together = not alone and dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    def sum(self, tensor: Tensor | None) -> Tensor:
        """The sum of all ranks' tensors of one shape; None where a rank has nothing to add.

        Raises:
            ValueError: if no rank has any.
        """
        shape, dtype = self._agreed(tensor)
        if tensor is None:
            tensor = torch.zeros(shape, dtype=dtype)
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def rows(self, tensor: Tensor | None) -> Tensor:
        """All ranks' rows ``(N_r, ...)`` one below the other.

        Raises:
            ValueError: if no rank has any.
        """
        shape, dtype = self._agreed(tensor)
        if tensor is None:
            tensor = torch.zeros(0, *shape[1:], dtype=dtype)
        if self.size == 1:
            return tensor
        counts: list[int] = [0] * self.size
        dist.all_gather_object(counts, len(tensor))
        padded = torch.zeros(max(counts), *shape[1:], dtype=dtype, device=self.device)
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        cut = [rows[:count] for rows, count in zip(found, counts, strict=True)]
        return torch.cat(cut).to(tensor.device)

    def _agreed(self, tensor: Tensor | None) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of a tensor, of which some ranks may have none."""
        mine = None if tensor is None else (tensor.shape, tensor.dtype)
        found = [mine]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, mine)
        there = [entry for entry in found if entry is not None]
        if not there:
            raise ValueError("There are no samples on any rank.")
        return there[0]

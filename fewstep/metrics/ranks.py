"""The processes that measure one set of samples together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 64 * 2**20  # bytes of all ranks' tables that are under way at once


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

    def lists(self, values: list[int]) -> list[list[int]]:
        """Each rank's list, on all ranks."""
        if self.size == 1:
            return [values]
        counts = [0] * self.size
        dist.all_gather_object(counts, len(values))
        padded = torch.zeros(max(counts), dtype=torch.int64)
        padded[: len(values)] = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(padded, device=self.device) for _ in counts]
        dist.all_gather(found, padded.to(self.device))
        return [rows[:count].tolist() for rows, count in zip(found, counts, strict=True)]

    def rows(self, tensor: Tensor | None) -> Tensor | None:
        """All ranks' rows ``(N_r, ...)`` one below the other, on the first rank's CPU.

        They travel in pieces of a bounded size, so that no GPU ever holds a table, and no other
        rank more than its own.

        Returns:
            None on all ranks but the first.

        Raises:
            ValueError: if no rank has any.
        """
        shape, dtype = self._agreed(tensor)
        mine = torch.zeros(0, *shape[1:], dtype=dtype) if tensor is None else tensor.cpu()
        if self.size == 1:
            return mine
        own = mine.contiguous().flatten().view(torch.uint8)
        counts = [0] * self.size
        dist.all_gather_object(counts, len(own))
        whole = self._gathered(own, counts)
        return None if whole is None else whole.view(dtype).view(-1, *shape[1:])

    def _gathered(self, own: Tensor, counts: list[int]) -> Tensor | None:
        """All ranks' bytes ``(counts[r],)``, joined on the first rank."""
        through = torch.device("cpu") if self._has_cpu() else self.device
        size = max(1, min(PIECE // self.size, max(counts)))
        first = self.rank == 0
        whole = torch.empty(sum(counts), dtype=torch.uint8) if first else None
        piece = torch.zeros(size, dtype=torch.uint8, device=through)
        pieces = [torch.empty_like(piece) for _ in counts] if first else None
        for start in range(0, max(counts), size):
            part = own[start : start + size]
            piece[: len(part)] = part
            dist.gather(piece, pieces, dst=0)
            place = 0
            for count, found in zip(counts, pieces or [], strict=False):
                there = min(max(count - start, 0), size)
                assert whole is not None
                whole[place + start : place + start + there] = found[:there]
                place += count
        return whole

    @staticmethod
    def _has_cpu() -> bool:
        """Whether the ranks can exchange what lies on the CPU; NCCL's cannot."""
        return "cpu:" in str(dist.get_backend_config())

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

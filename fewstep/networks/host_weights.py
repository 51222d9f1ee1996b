"""Frozen weights that stay on the host while a device has copies of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")
Place = tuple[object, ...]


class HostWeights:
    """The weights of frozen modules, which go to a device and never need to come back.

    What is on the device are copies; to let them go, parameters and buffers point at the host's
    again, which copies nothing and allocates nothing. With CUDA the host's are pinned, so that a
    copy to the device neither goes through another buffer nor waits for it.

    Args:
        modules: on the host; nobody changes their weights.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        unique = {id(tensor): tensor for tensor in found}.values()
        self._tensors = [(tensor, _place(tensor)) for tensor in unique]
        self._masters: dict[Place, Tensor] = {}
        for tensor, place in self._tensors:
            if place not in self._masters:
                self._masters[place] = _pinned(tensor.data)
            tensor.data = self._masters[place]  # at once, so that the host has no two of them all
        self._where = HOST

    def to(self, device: torch.device) -> None:
        """Has the modules compute on a device; on the host it frees what the device had."""
        if device == self._where:
            return
        if device == HOST:
            self._point_at(self._masters)
        else:
            copies = {place: self._copied(m, device) for place, m in self._masters.items()}
            self._point_at(copies)
        self._where = device

    def _point_at(self, found: dict[Place, Tensor]) -> None:
        for tensor, place in self._tensors:
            tensor.data = found[place]

    @staticmethod
    def _copied(master: Tensor, device: torch.device) -> Tensor:
        return master.to(device, non_blocking=True)


def _place(tensor: Tensor) -> Place:
    """What tells memory from memory: tied weights have one place, whoever holds them."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory that a GPU can read by itself, where there is a GPU and such memory."""
    if not torch.cuda.is_available():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:  # no more memory may be locked: copies take longer, and are the same
        return tensor

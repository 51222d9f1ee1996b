"""What a training step's tensors take, counted while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules import preparation


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors made within it and not yet freed.

    Args:
        known: tensors whose memory is counted elsewhere.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any] | None] = {}
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of the memory it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.live += size

        def freed(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)

    def hand_over(self, tensor: Tensor) -> None:
        """From here on a tensor's memory is counted elsewhere."""
        storage = tensor.untyped_storage()
        if self._seen.get(storage._cdata) is not None:
            self.live -= storage.nbytes()
            self._seen[storage._cdata] = None


class SavedBytes:
    """Bytes of what autograd saves for the backward pass, each storage once.

    Args:
        known: tensors whose memory is counted elsewhere, such as parameters.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is saved meanwhile."""
        patched: Any = preparation
        checkpoint = patched.checkpoint

        def listening(function: Any, *args: Any, **options: Any) -> Any:
            for value in options.values():  # which torch keeps where no hook sees it
                if isinstance(value, Tensor):
                    self._pack(value)
            return checkpoint(function, *args, **options)

        patched.checkpoint = listening
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            patched.checkpoint = checkpoint

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor.detach()  # an output that kept itself would never be freed

    def take(self) -> int:
        """The bytes since the last call."""
        total = sum(self._sizes.values())
        self._sizes.clear()
        return total

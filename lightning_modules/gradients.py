"""Gradients of several roles on several devices: whose they are, and their average over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

BUCKET_BYTES = 25 * 2**20


def is_sharded(parameters: Sequence[Parameter]) -> bool:
    """Whether any of these are the shards of FSDP2, which averages their gradients itself."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


@contextmanager
def kept_out(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Whatever a backward pass adds to these parameters' gradients is thrown away.

    For graphs of sharded modules, whose leaves are made anew for each pass, so that
    ``backward(inputs=...)`` cannot name them.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient


class GradientAverager:
    """Averages replicated parameters' gradients over all ranks while backward still runs.

    torch's DDP wraps a whole module and expects each of its parameters in each backward pass; with
    several roles, a pass trains one and goes through others. Here every role has buckets of its
    own, and only the pass that is announced by :meth:`arm` is averaged. Buckets are sent in the
    same order on every rank, as soon as all their gradients are there.

    Args:
        parameters: of one role, the same on all ranks.
        bucket_bytes: how much is sent at once.
    """

    def __init__(self, parameters: Sequence[Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.buckets: list[list[Parameter]] = [[]]
        room = bucket_bytes
        for parameter in reversed(parameters):  # about the order in which gradients appear
            size = parameter.numel() * parameter.element_size()
            if self.buckets[-1] and (room < size or self.buckets[-1][0].dtype != parameter.dtype):
                self.buckets.append([])
                room = bucket_bytes
            self.buckets[-1].append(parameter)
            room -= size
        self.armed = False
        self._missing: list[int] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def arm(self) -> None:
        """Announces the last backward pass of an update."""
        self.armed = True
        self._missing = [len(bucket) for bucket in self.buckets]
        self._sent = []

    def finish(self) -> None:
        """Waits until all gradients are averages."""
        while len(self._sent) < len(self.buckets):
            self._send()
        for (work, flat), bucket in zip(self._sent, self.buckets, strict=True):
            work.wait()
            flat.div_(dist.get_world_size())
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            pieces = flat.split([parameter.numel() for parameter in bucket])
            shaped = [piece.view_as(p) for piece, p in zip(pieces, bucket, strict=True)]
            torch._foreach_copy_(gradients, shaped)
        self.armed = False
        self._sent = []

    def _arrived(self, number: int, _parameter: Tensor) -> None:
        if not self.armed:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        for parameter in bucket:
            if parameter.grad is None:  # a parameter that this pass did not use
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))

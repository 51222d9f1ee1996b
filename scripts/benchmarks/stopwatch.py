"""Which role the time of a step goes to, and how often its networks are evaluated."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scripts.benchmarks.adversarial_steps import Contestant

REST = "rest"
ROLES = ("teacher", "student", "discriminator", REST)


class Stopwatch:
    """Splits a contestant's steps by role, at the moments at which the work changes hands.

    On a GPU moments are events in its stream, so that looking does not make anything wait. A
    backward pass belongs to the discriminator, its frozen network included, until the gradient
    arrives at the student's output. What is left is the rest: optimisers, the average, losses.

    Args:
        side: its methods are watched from here on.
        batch: samples a step.
    """

    def __init__(self, side: Contestant, batch: int) -> None:
        self.batch = batch
        self.restart()
        self._cuda = next(side.teacher.parameters()).is_cuda
        self._role = REST
        self._moments: list[tuple[str, Any]] = []
        for owner, method, role in (
            (side.teacher, "guided", "teacher"),
            (side.teacher, "forward", "teacher"),
            (side.student, "forward", "student"),
            (side.discriminator, "features", "discriminator"),
            (side.discriminator, "score", "discriminator"),
            (side, "backward", "discriminator"),
        ):
            self._watch(owner, method, role)
        networks = {id(d.backbone): d.backbone for d in (side.teacher, side.student)}
        for network in networks.values():
            network.register_forward_hook(self._evaluated)

    def restart(self) -> None:
        """Counts evaluations from zero."""
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.calls = 0

    def measure(self, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of a step that each role takes; evaluations are counted."""
        self._moments.clear()
        self._mark(REST)
        step()
        self._mark(REST)
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (role, begin), (_, end) in pairwise(self._moments):
            seconds[role] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
        return {role: seconds[role] for role in ROLES}

    def _watch(self, owner: Any, method: str, role: str) -> None:
        inner = getattr(owner, method)

        @wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._at(role):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)

    @contextmanager
    def _at(self, role: str) -> Iterator[None]:
        before = self._role
        self._mark(role)
        yield
        self._mark(before)

    def _mark(self, role: str) -> None:
        self._role = role
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((role, moment))

    def _evaluated(self, _network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, role = inputs[0], self._role
        self.calls += 1
        self.forward[role] += len(x) // self.batch

        def returned(_gradient: Tensor) -> None:
            self.backward[role] += 1
            if role == "student":
                self._mark(role)

        # Features are taken on the way, so only the input tells of the discriminator's gradient.
        if x.requires_grad:
            x.register_hook(returned)
        elif output.requires_grad:
            output.register_hook(returned)

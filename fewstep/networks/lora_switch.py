"""Which adapter the layers of a network use: one name for the process, set for the time of a call.

So changing it costs nothing, however many layers there are, and touches none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fewstep.networks.gates.time import at, now


class _InUse:
    """The name of the adapter that layers add, None for none.

    One for the process and no thread's own: the backward pass of a GPU, where activations are
    computed once more, runs in a thread of autograd's.
    """

    name: str | None = None


_IN_USE = _InUse()


class using:  # noqa: N801 - reads as the statement it is
    """``with using(name):`` layers add the adapter of this name, or none; may be entered again."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before.append(_IN_USE.name)
        _IN_USE.name = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _IN_USE.name = self._before.pop()


def pinned(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, to be run with the adapter that is in use now, whenever that may be.

    For what the backward pass computes once more, by when another adapter may be in use. What is
    being compiled has the adapter's name in it already. So it is with the time that gates see.
    """
    if torch.compiler.is_compiling():
        return function
    adapter, time = using(_IN_USE.name), now()

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with adapter, at(time):
            return function(*args, **kwargs)

    return run


class Switched:
    """Mixed into a peft layer's class: it adds the adapter in use, whatever peft's own state is.

    A class, rather than replaced attributes, so that copies of the layer are whole.
    """

    lora_A: dict[str, nn.Module]  # noqa: N815 - peft's name

    @property
    def disable_adapters(self) -> bool:
        return _IN_USE.name not in self.lora_A

    @property
    def active_adapters(self) -> list[str | None]:
        return [_IN_USE.name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # AnimateDiff's motion modules name their input, as torch's layers allow and peft's do not.
        given = [kwargs.pop("input")] if "input" in kwargs else []
        return super().forward(*given, *args, **kwargs)  # type: ignore[misc]


_KINDS: dict[Any, type[nn.Module]] = {}


def make_switched(layer: nn.Module) -> None:
    """Lets a peft layer follow the name in use."""
    kind = type(layer)
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (Switched, kind), {})
    layer.__class__ = _KINDS[kind]

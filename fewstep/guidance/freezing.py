"""Networks whose parameters ask for no gradient while samples are guided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType

from torch import Tensor, nn

OPAQUE = (Tensor, str, bytes, type, ModuleType, FunctionType)
"""Things that are not looked into: they hold no networks, or none that is theirs."""


@contextmanager
def frozen(*things: object) -> Iterator[None]:
    """Parameters of modules, and of all modules that things hold, ask for no gradient meanwhile.

    Gradients are only ever taken of the state; this saves the activations that those of the
    parameters would need. Things are looked into however deep they hold a module: in attributes,
    mappings, lists, bound methods and partial functions.
    """
    parameters = {p for module in modules_within(*things) for p in module.parameters()}
    changed = [p for p in parameters if p.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def modules_within(*things: object) -> Iterator[nn.Module]:
    """The outermost modules that things are or hold."""
    return (thing for thing in things_within(*things) if isinstance(thing, nn.Module))


def things_within(*things: object) -> Iterator[object]:
    """Things and all that they hold, but for what modules hold."""
    seen: dict[int, object] = {}  # keeps what is looked at, so that no number is used again
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, OPAQUE):
            continue
        seen[id(thing)] = thing
        yield thing
        if not isinstance(thing, nn.Module):
            waiting.extend(_held(thing))


def _held(thing: object) -> list[object]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, MethodType):
        return [thing.__self__]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    return list(getattr(thing, "__dict__", {}).values())

"""A configuration in plain values: what tells one run's guidance from another's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.metrics.fingerprints import digest, fingerprint

FEW = 16  # numbers of a tensor that are written down rather than hashed
NAMED = (PurePath, torch.dtype, torch.device, float)  # floats that JSON has no number for
CODE = (type, FunctionType, BuiltinFunctionType)


def described(thing: Any, within: tuple[int, ...] = ()) -> Any:
    """A configuration in plain values that JSON gives back as they are.

    Networks are described by their weights and what they say of themselves (``extra_repr``), other
    objects by their class and their public attributes, code by its name: never by where in memory
    they lie.

    Args:
        within: what the thing is held by, which is not described again.
    """
    if isinstance(thing, Enum):
        thing = thing.value
    if isinstance(thing, str | int | None) or (isinstance(thing, float) and math.isfinite(thing)):
        return thing
    if isinstance(thing, NAMED):
        return str(thing)
    if isinstance(thing, CODE):
        return f"{thing.__module__}.{thing.__qualname__}"
    inner = partial(described, within=(*within, id(thing)))
    if isinstance(thing, list | tuple):
        return [inner(part) for part in thing]
    parts = {} if id(thing) in within else _parts(thing)
    if not isinstance(thing, Mapping):
        parts = {"class": type(thing).__name__, **parts}
    return {str(name): inner(part) for name, part in parts.items()}


def _parts(thing: Any) -> Mapping[Any, Any]:
    """What a thing consists of, by name."""
    if isinstance(thing, Mapping):
        return thing
    if isinstance(thing, Tensor):
        few = thing.numel() <= FEW
        values = {"values": thing.flatten().tolist()} if few else {"sha256": digest([thing])}
        return {"shape": list(thing.shape), **values}
    if isinstance(thing, nn.Module):
        said = thing.extra_repr()
        return {"sha256": fingerprint(thing), **({"options": said} if said else {})}
    if is_dataclass(thing):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return _held(thing)


def _held(thing: Any) -> Mapping[str, Any]:
    """What a plain object, a bound method or the like holds."""
    if isinstance(thing, MethodType):
        return {"method": thing.__func__, "of": thing.__self__}
    if isinstance(thing, partial):
        return {"function": thing.func, "arguments": thing.args, "options": thing.keywords}
    if isinstance(thing, set | frozenset):
        return {"items": sorted(thing, key=str)}
    held = getattr(thing, "__dict__", {})
    return {name: held[name] for name in sorted(held) if not name.startswith("_")}

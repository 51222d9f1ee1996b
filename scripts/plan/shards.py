"""What FSDP2 makes of a method's roles: each device's share, and what is whole on it at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import Parameter

from lightning_modules import FewStepModule
from lightning_modules.parallel import Unit, units_of


def sharded_roles(model: FewStepModule) -> dict[str, nn.Module]:
    """The roles that a run shards, by name; without a backbone, a role stays replicated."""
    return {
        name: role
        for name, role in model._roles()
        if (name not in model.frozen_roles or model.shard_frozen)
        and any(True for _ in units_of(role))
    }


def share(parameters: Iterable[Parameter], shares: int) -> int:
    """Bytes of the largest of so many shards: each parameter's rows are dealt out whole."""
    total = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.ndim else 1
        total += -(-rows // shares) * (parameter.nbytes // max(rows, 1))
    return total


def gathered(model: FewStepModule, low_precision: torch.dtype | None) -> int:
    """Bytes of what is whole at a time at most: what is left of a role, and its largest unit.

    Args:
        low_precision: what narrow units are gathered in; None is their own.
    """
    evaluated, found = model.evaluations(), [0]
    for name, role in sharded_roles(model).items():
        if name not in evaluated:  # an average that only samples, when nothing else is here
            continue
        dtype = None if name == "ema" else low_precision
        sizes = [(unit.rest, _size(unit, own, dtype)) for unit, own in _owners(role)]
        units = [size for rest, size in sizes if not rest]
        found.append(sum(size for rest, size in sizes if rest) + max(units, default=0))
    return max(found)


def narrow(role: nn.Module, low_precision: torch.dtype) -> None:
    """Gives narrow units' weights the precision that they are gathered, and computed with, in."""
    for unit, own in _owners(role):
        for parameter in own if unit.narrow else ():
            parameter.data = parameter.data.to(low_precision)


def _owners(role: nn.Module) -> list[tuple[Unit, list[Parameter]]]:
    """Each unit with the parameters that are in none of those within it."""
    seen: set[int] = set()
    found = []
    for unit in units_of(role):
        own = [p for p in unit.module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        found.append((unit, own))
    return found


def _size(unit: Unit, own: list[Parameter], low_precision: torch.dtype | None) -> int:
    if low_precision is None or not unit.narrow:
        return sum(parameter.nbytes for parameter in own)
    return sum(parameter.numel() for parameter in own) * low_precision.itemsize

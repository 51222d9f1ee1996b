"""Hybrid sharding: gradients cross from one copy of the model to the others once an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from fewstep.errors import FewstepError


def units_within(role: nn.Module) -> list[FSDPModule]:
    """What FSDP2 gathers and reduces of a role, each on its own."""
    return [module for module in role.modules() if isinstance(module, FSDPModule)]


@contextmanager
def crossing(own: Sequence[FSDPModule], others: Sequence[FSDPModule], last: bool) -> Iterator[None]:
    """A backward pass that ends at copies' borders, unless it is the last of its update.

    Within a copy gradients are summed after each pass, over fast links. FSDP2 keeps those sums,
    shard by shard, until a pass in which units cross; then it averages all of them over the copies.
    A unit that such a pass does not reach would keep its sum for the next update, so every pass of
    an update must reach the same parameters.

    Args:
        own: units of the roles that the pass trains.
        others: units of all other trained roles. They never cross, as what they get is thrown away;
            the sums that they have kept of their own passes stay.
        last: whether it is the last pass of the update.

    Raises:
        FewstepError: if a unit got gradient in the update, and none in its last pass.
    """
    kept = [group._partial_reduce_output for group in _groups(others)]
    for unit in own:
        unit.set_requires_all_reduce(last, recurse=False)
    for unit in others:
        unit.set_requires_all_reduce(False, recurse=False)
    for group in _groups(others):
        group._partial_reduce_output = None
    yield
    for unit in (*own, *others):
        unit.set_requires_all_reduce(True, recurse=False)
    for group, partial in zip(_groups(others), kept, strict=True):
        group._partial_reduce_output = partial
    if last and any(group._partial_reduce_output is not None for group in _groups(own)):
        raise FewstepError(
            "Some parameters got gradient in this update, but none from its last micro-batch, so "
            "that the copies of the model would drift apart. Set accumulate: 1, or the strategy's "
            "`replicas` to 1."
        )


def _groups(units: Sequence[FSDPModule]) -> list[Any]:
    """What units reduce together; by its version, torch has one group a unit or a list of them."""
    found: list[Any] = []
    for unit in units:
        state: Any = unit._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)
        found += [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]

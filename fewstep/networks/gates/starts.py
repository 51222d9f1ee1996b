"""Where alpha starts, and whether a network that starts there can learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.gate import Gate
from fewstep.networks.gates.gated import network_of
from fewstep.networks.gates.sites import Site, branch_sites
from fewstep.networks.gates.spec import Init

# Modules of diffusers whose linear layer makes, among others, the factor of a branch.
MODULATIONS = ("AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX")
TABLE = "scale_shift_table"


def start(policy: Init, units: int) -> float:
    """Alpha's first value in a stack of so many gated units that add to one stream.

    ``depth`` keeps the variance of a sum of independent branches, and of their gradients, free of
    the depth: ``sum alpha^2 = 1``. ``ode`` is the step of Euler's method over unit time.
    """
    return {"identity": 1.0, "depth": units**-0.5, "ode": 1 / units, "zero": 0.0}[policy]


@torch.no_grad()
def set_starts(gates: Sequence[tuple[Site, Gate]], policy: Init) -> tuple[float, ...]:
    """Sets alpha of each gate.

    Args:
        gates: all gates of units, and where they are.
        policy: see :class:`~fewstep.networks.gates.spec.ResidualGates`.

    Returns:
        The values that alpha starts at, in rising order.
    """
    units = Counter(site.side for site, _ in gates)
    starts = {side: start(policy, count) for side, count in units.items()}
    for site, gate in gates:
        if gate.delta is not None:
            gate.delta.fill_(starts[site.side] - 1)
    return tuple(sorted(set(starts.values())))


def check_alive(network: nn.Module, sites: Iterable[Site]) -> None:
    """Refuses an alpha of zero where the branch is multiplied with, or is, zero already.

    With adaLN-Zero's gate ``g = 0`` and ``alpha = 0``, the gradients of alpha (a multiple of
    ``g``), of ``g`` (of alpha) and of the branch (of both) are exactly zero: none ever moves. So it
    is where the branch's last layer is zero, whose gradient is a multiple of alpha. Of a network on
    the meta device, which is only planned, nothing is known.

    Raises:
        FewstepError: naming the first such unit.
    """
    dead = first_dead(network, sites)
    if dead is not None:
        raise FewstepError(
            f"gates.init zero can never train {dead} is zero too, so the gradients of alpha, of "
            "that and of the branch are all exactly zero. Set gates.init: identity (or depth); "
            "such a block starts as the identity anyway."
        )


def first_dead(network: nn.Module, sites: Iterable[Site]) -> str | None:
    """The first unit that is zero without its gate, and what of it is; None if there is none.

    Of a network on the meta device nothing is known.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return None
    found = ((site, next(_dead(network, site), None)) for site in sites)
    return next((f"'{site.name}': its {dead}" for site, dead in found if dead is not None), None)


def is_asleep(model: nn.Module) -> bool:
    """Whether no residual branch does anything yet, as in an adaLN-Zero network just built.

    Gates on such branches have gradients of exactly zero until other weights have moved. Of a
    network on the meta device nothing is known.
    """
    network = network_of(model)
    if any(parameter.is_meta for parameter in network.parameters()):
        return False
    sites = list(branch_sites(network))
    return bool(sites) and all(next(_dead(network, site), None) is not None for site in sites)


def _dead(network: nn.Module, site: Site) -> Iterator[str]:
    block = network.get_submodule(site.block)
    for name, module in block.named_modules():
        linear = getattr(module, "linear", None)
        known = type(module).__name__ in MODULATIONS
        if known and isinstance(linear, nn.Linear) and _zero(linear):
            yield f"modulation '{site.block}.{name}.linear' (adaLN-Zero)"
    table = getattr(block, TABLE, None)
    if isinstance(table, Tensor) and not table.any():
        yield f"modulation '{site.block}.{TABLE}' (adaLN-single)"
    layer = network.get_submodule(site.name)
    last = layer.get_submodule(site.stream.last) if site.stream is not None else layer
    if _zero(last):
        yield "last layer"


def _zero(layer: nn.Module) -> bool:
    return not any(parameter.any() for parameter in layer.parameters(recurse=False))

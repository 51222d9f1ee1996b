"""Putting gates on a network.

A gate is a submodule of the layer or block it gates. So copies, averages, checkpoints, moves,
sharding and recomputation treat it as any other part of the network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import position_of
from fewstep.networks.gates.gate import FuseGate, Gate, SkipGate
from fewstep.networks.gates.gated import (
    SPEC,
    AnyGate,
    backbone_of,
    gate_spec,
    is_gated,
    network_of,
)
from fewstep.networks.gates.hooks import hang, take_away
from fewstep.networks.gates.precision import keep_streams_float32
from fewstep.networks.gates.sites import GATE_NAMES, SKIPS, Site, SkipSite, find_sites, find_skips
from fewstep.networks.gates.spec import ResidualGates
from fewstep.networks.gates.starts import check_alive, set_starts
from fewstep.networks.gates.table import GateTable, Row
from fewstep.networks.gates.time import watch_time

IN_FLOAT32 = "_keep_in_fp32_modules"  # diffusers' name for the parts that stay so


@dataclass(frozen=True)
class Plan:
    """Where gates go.

    Attributes:
        sites: the units that get gates.
        skips: the long skips that get gates.
    """

    sites: list[Site]
    skips: list[SkipSite]


def apply_gates(model: nn.Module, spec: ResidualGates) -> GateTable:
    """Gates a network's residual units, in place.

    Do so before compiling, sharding and copying it. Gates are trainable, whatever the rest of the
    network is; a backbone lists them among its changes, so that it is rebuilt with them.

    Args:
        model: a denoiser, a backbone or a network of any kind.
        spec: which units get which gates, and where alpha starts.

    Returns:
        The gates, to be printed.

    Raises:
        FewstepError: if there are gates already, nothing to gate, or gates that could not learn.
    """
    network = network_of(model)
    plan = _plan(model, spec)
    if spec.init == "zero":
        check_alive(network, plan.sites)
    gates = _hang_all(model, spec, plan)
    units = [(site, gate) for site, gate in gates if isinstance(site, Site)]
    starts = set_starts([(s, g) for s, g in units if isinstance(g, Gate)], spec.init)
    rows = (
        Row(
            f"{site.name}.{site.gate}",
            site.kind,
            site.channels,
            sum(parameter.numel() for parameter in gate.parameters()),
        )
        for site, gate in gates
    )
    return GateTable(spec, tuple(rows), starts)


def install(model: nn.Module, spec: ResidualGates) -> None:
    """Puts the gates on a network that :func:`apply_gates` would, all of them zero.

    For networks whose weights, and so the gates', are loaded afterwards.

    Raises:
        FewstepError: as that does.
    """
    _hang_all(model, spec, _plan(model, spec))


def _plan(model: nn.Module, spec: ResidualGates) -> Plan:
    network = network_of(model)
    _check_plain(model, network)
    sites = [] if spec.mode == "none" else find_sites(network, spec)
    return Plan(sites, find_skips(network) if spec.skip else [])


def _check_plain(model: nn.Module, network: nn.Module) -> None:
    """Refuses networks on which gates would not work, or would change what was not asked for."""
    modules = list(network.modules())
    reason = None
    if is_gated(network):
        reason = "has residual gates already; load it anew, or merge them first"
    elif any(hasattr(module, "lora_A") for module in modules):
        reason = "has LoRA adapters, which its roles share; merge them first, or train one of both"
    elif any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        reason = "is sharded already; add gates before"
    elif type(model).__name__ == "OptimizedModule" or any(
        module._compiled_call_impl is not None for module in modules
    ):
        reason = "is compiled already, and would not call its gates; add them before"
    if reason is not None:
        raise FewstepError(f"Residual gates: this {type(network).__name__} {reason}.")


def _hang_all(
    model: nn.Module, spec: ResidualGates, plan: Plan
) -> list[tuple[Site | SkipSite, AnyGate]]:
    network, backbone = network_of(model), backbone_of(model)
    gates: list[tuple[Site | SkipSite, AnyGate]] = []
    sites: list[Site | SkipSite] = [*plan.sites, *plan.skips]
    for site in sites:
        module = network.get_submodule(site.name)
        gate = _made(module, site, spec)
        hang(module, site.gate, gate)
        gates.append((site, gate))
    if not gates:
        return []
    if spec.stream_dtype == "float32":
        keep_streams_float32(network)
    if spec.time_conditioned:
        watch_time(network)
    setattr(network, SPEC, spec)
    for holder in (network, backbone) if backbone is not network else (network,):
        if holder is not None:
            kept = getattr(holder, IN_FLOAT32, None) or []
            setattr(holder, IN_FLOAT32, [*kept, *GATE_NAMES])
    if backbone is not None:
        backbone.changes = (*backbone.changes, spec)
    return gates


def remove_gates(model: nn.Module) -> None:
    """Takes a network's gates away, in place: what they did is gone.

    Its state is named as an ungated network's again.

    Raises:
        FewstepError: if it has none.
    """
    network, backbone, spec = network_of(model), backbone_of(model), gate_spec(model)
    for module in list(network.modules()):
        take_away(module)
    delattr(network, SPEC)
    for holder in (network, backbone):
        if holder is not None:
            kept = [n for n in getattr(holder, IN_FLOAT32) or () if n not in GATE_NAMES]
            setattr(holder, IN_FLOAT32, kept or None)
    if backbone is not None:
        backbone.changes = tuple(change for change in backbone.changes if change != spec)
    if "torch._dynamo" in sys.modules:  # what is compiled does not notice that hooks are gone
        torch._dynamo.reset()


def _made(module: nn.Module, site: Site | SkipSite, spec: ResidualGates) -> AnyGate:
    like = next(module.parameters())
    if isinstance(site, SkipSite):
        if site.count is None:
            return FuseGate(like)
        return SkipGate(site.count, like, position_of(module, SKIPS))
    position = None if site.stream is None else position_of(module, site.stream.argument)
    return Gate(spec, site.channels, site.channel_dim, like, site.stream, position)

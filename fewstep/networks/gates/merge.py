"""Merging gates into the weights, so that the network is an ordinary one again.

A gate on the last layer of a branch is a change of that layer: ``alpha (W x + b) + beta`` is
``(alpha W) x + (alpha b + beta)``. A gate around a block, on a skip in front of a norm, or one that
depends on the time is none of a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks.gates.apply import remove_gates
from fewstep.networks.gates.gate import FuseGate, Gate, SkipGate
from fewstep.networks.gates.gated import AnyGate, gate_spec, gates_of, network_of


@torch.no_grad()
def merge_gates(model: nn.Module) -> list[str]:
    """Merges all gates into the weights, in place; what the network computes stays the same.

    Its state is then named as an ungated network's. Nothing is changed if one gate cannot be
    merged. What was compiled is compiled anew when it is next called.

    Returns:
        The names of the gates.

    Raises:
        FewstepError: if there are none, or some cannot be merged, which are named with the reason.
    """
    gate_spec(model)
    network = network_of(model)
    gates = dict(gates_of(network))
    _check(network, gates)
    for name, gate in gates.items():
        layer = network.get_submodule(_layer_of(name))
        if isinstance(gate, Gate) and gate.stream is None:
            _fold(layer, gate)
        elif isinstance(gate, FuseGate):
            weight = layer.get_parameter("weight")
            half = weight.shape[1] // 2
            weight[:, half:] = _scaled(weight[:, half:], 1 + gate.sigma.double())
    remove_gates(model)
    return list(gates)


def can_merge(model: nn.Module) -> bool:
    """Whether all of a network's gates are a change of its weights.

    Raises:
        FewstepError: if it has none.
    """
    gate_spec(model)
    network = network_of(model)
    return not _reasons(network, dict(gates_of(network)))


def _check(network: nn.Module, gates: dict[str, AnyGate]) -> None:
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        raise FewstepError("Gates of a sharded network cannot be merged; merge a whole copy.")
    reasons = _reasons(network, gates)
    if reasons:
        told = "; ".join(f"{_some(names)} {reason}" for reason, names in reasons.items())
        raise FewstepError(
            f"These gates cannot be merged into weights: {told}. Keep them beside the network "
            "with save_gates, which load_gates puts back."
        )


def _reasons(network: nn.Module, gates: dict[str, AnyGate]) -> dict[str, list[str]]:
    """Why gates cannot be merged, and the names of those of which it is true."""
    reasons: dict[str, list[str]] = {}
    for name, gate in gates.items():
        reason = _obstacle(network.get_submodule(_layer_of(name)), gate)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    return reasons


def _obstacle(layer: nn.Module, gate: AnyGate) -> str | None:
    """Why a gate is no change of a weight; None if it is one, or changes nothing."""
    if isinstance(gate, FuseGate) or not any(p.any() for p in gate.parameters()):
        return None
    if isinstance(gate, SkipGate):
        return "scales a skip in front of a norm"
    if gate.stream is not None:
        return "surrounds a whole block"
    if any(p is not None and p.any() for p in (gate.delta_of_time, gate.beta_of_time)):
        return "depends on the time"
    if gate.beta is not None and gate.beta.any() and getattr(layer, "bias", None) is None:
        return "adds a beta to a layer without a bias, which the network's own class has not"
    return None


def _fold(layer: nn.Module, gate: Gate) -> None:
    """``W <- alpha W, b <- alpha b + beta``; rows of ``W`` are channels of the output."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    alpha = torch.ones(1) if gate.delta is None else 1 + gate.delta.double()
    weight.copy_(_scaled(weight, alpha.reshape(-1, *[1] * (weight.ndim - 1))))
    if bias is not None:
        beta = 0.0 if gate.beta is None else gate.beta.double()
        bias.copy_((bias.double() * alpha.to(bias.device) + beta).to(bias.dtype))


def _scaled(weight: Tensor, alpha: Tensor) -> Tensor:
    return (weight.double() * alpha.to(weight.device)).to(weight.dtype)


def _layer_of(gate: str) -> str:
    return gate.rpartition(".")[0]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more

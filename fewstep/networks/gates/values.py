"""What gates have become: a few numbers each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GateValue:
    """A gate in numbers; None for what it has not.

    Attributes:
        name: of the gate.
        alpha: the factor of the branch, the mean over channels. What the time adds is left out.
        spread: the standard deviation of alpha over channels; 0 of a scalar.
        beta: the norm of what is added.
        rho: the factor of the stream.
        skip: the mean factor of the long skips.
    """

    name: str
    alpha: float | None = None
    spread: float | None = None
    beta: float | None = None
    rho: float | None = None
    skip: float | None = None


def gate_values(tensors: Mapping[str, Tensor]) -> list[GateValue]:
    """Gates in numbers, in the order of their names, in which 10 comes after 9.

    Args:
        tensors: their parameters by name, see :func:`fewstep.networks.gates.gate_tensors`. To be
            read from a device this waits for it: not for a training step.
    """
    gates: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        gate, _, kind = name.rpartition(".")
        gates.setdefault(gate, {})[kind] = tensor.detach().double()
    return [_value(name, gates[name]) for name in sorted(gates, key=_by_number)]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _value(name: str, of: Mapping[str, Tensor]) -> GateValue:
    delta, beta = of.get("delta"), of.get("beta")
    return GateValue(
        name,
        alpha=_mean(delta),
        spread=None if delta is None else delta.std(unbiased=False).item(),
        beta=None if beta is None else beta.norm().item(),
        rho=_mean(of.get("kappa")),
        skip=_mean(of.get("sigma")),
    )


def _mean(difference: Tensor | None) -> float | None:
    return None if difference is None else 1 + difference.mean().item()

"""Learnable gates on the residual units of any network (Neural Residual Diffusion)."""

from fewstep.networks.gates.apply import apply_gates
from fewstep.networks.gates.files import (
    gate_tensors,
    has_gates,
    load_gates,
    read_gates,
    save_gates,
)
from fewstep.networks.gates.gated import gate_parameters, gate_spec, gates_of, is_gated
from fewstep.networks.gates.merge import can_merge, merge_gates
from fewstep.networks.gates.spec import ResidualGates
from fewstep.networks.gates.surgery import grow, prune
from fewstep.networks.gates.table import GateTable
from fewstep.networks.gates.values import GateValue, gate_values

__all__ = [
    "GateTable",
    "GateValue",
    "ResidualGates",
    "apply_gates",
    "can_merge",
    "gate_parameters",
    "gate_spec",
    "gate_tensors",
    "gate_values",
    "gates_of",
    "grow",
    "has_gates",
    "is_gated",
    "load_gates",
    "merge_gates",
    "prune",
    "read_gates",
    "save_gates",
]

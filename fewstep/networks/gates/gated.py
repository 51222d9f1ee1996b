"""Finding the gates of a network."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fewstep.diffusion.denoiser import Backbone, Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.gates.gate import FuseGate, Gate, SkipGate
from fewstep.networks.gates.spec import ResidualGates
from fewstep.networks.lora_targets import inner_network

AnyGate = Gate | SkipGate | FuseGate
SPEC = "rdm_spec"  # the attribute in which a gated network keeps its options


def backbone_of(model: nn.Module) -> Backbone | None:
    """The backbone that a model is or holds, if it is one or a denoiser."""
    found = model.backbone if isinstance(model, Denoiser) else model
    return found if isinstance(found, Backbone) else None


def network_of(model: nn.Module) -> nn.Module:
    """The network whose own files name the layers: within a denoiser or a backbone, or itself."""
    backbone = backbone_of(model)
    return model if backbone is None else inner_network(backbone)


def gates_of(model: nn.Module) -> Iterator[tuple[str, AnyGate]]:
    """Gates by name, such as ``transformer_blocks.0.ff.net.2.rdm_gate``, in the network's order."""
    for name, module in model.named_modules():
        if isinstance(module, AnyGate):
            yield name, module


def is_gated(model: nn.Module) -> bool:
    """Whether there are gates in a model."""
    return next(gates_of(model), None) is not None


def gate_spec(model: nn.Module) -> ResidualGates:
    """The options that a network was gated with.

    Raises:
        FewstepError: if it was not.
    """
    network = network_of(model)
    spec = getattr(network, SPEC, None)
    if not isinstance(spec, ResidualGates):
        raise FewstepError(
            f"This {type(network).__name__} has no residual gates: none were added, or they have "
            "been merged."
        )
    return spec


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of the gates, for an optimiser's group without weight decay."""
    return [parameter for _, gate in gates_of(model) for parameter in gate.parameters()]

"""Groups of a role's parameters that an optimiser treats differently."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from fewstep.networks.gates import gate_parameters


def grouped(make: OptimizerCallable, role: nn.Module, gates_lr: float = 1.0) -> Optimizer:
    """A role's optimiser, in which residual gates are a group without weight decay.

    Decay would pull what is stored of a gate to zero, so alpha to 1 and beta to 0, and undo what
    the gate has learnt.

    Args:
        make: makes the optimiser from parameters or groups of them.
        role: whose trainable parameters it steps.
        gates_lr: the gates' learning rate, as a multiple of that of the others.
    """
    trained = [parameter for parameter in role.parameters() if parameter.requires_grad]
    gates = [parameter for parameter in gate_parameters(role) if parameter.requires_grad]
    if not gates:
        return make(trained)
    known = {id(parameter) for parameter in gates}
    others = [parameter for parameter in trained if id(parameter) not in known]
    groups = [{"params": others}] if others else []
    optimizer = make([*groups, {"params": gates, "weight_decay": 0.0}])
    last = optimizer.param_groups[-1]
    last["lr"] = last["lr"] * gates_lr
    return optimizer


def held(
    optimizer: Optimizer, role: nn.Module, factor: Callable[[int], float], hold: int
) -> list[Callable[[int], float]]:
    """Learning-rate factors of an optimiser's groups, zero of gates in the first ``hold`` updates.

    They depend on the number of the update alone, so a resumed run holds on where it was. With a
    rate of zero, and without weight decay, a gate stays as it is to the bit, while what the
    optimiser remembers of its gradients is gathered.

    Args:
        optimizer: as :func:`grouped` makes it.
        role: whose parameters it steps.
        factor: of all others, by the number of updates done.
        hold: how many updates gates wait.
    """
    gates = {id(parameter) for parameter in gate_parameters(role)}

    def waiting(update: int) -> float:
        return factor(update) if update >= hold else 0.0

    groups = optimizer.param_groups
    return [waiting if id(group["params"][0]) in gates else factor for group in groups]

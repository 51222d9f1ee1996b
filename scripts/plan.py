"""What an experiment will cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_modules import FewStepModule

MIB = 2**20
ADAM_STATES = 2


@dataclass(frozen=True)
class RolePlan:
    """One role's share of the cost, bytes a device."""

    role: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """All of the role's bytes on a device, without activations."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """The cost of an experiment."""

    method: str
    roles: list[RolePlan]
    batch_size: int
    devices: int
    sharded: bool


def plan_of(model: FewStepModule, batch_size: int, devices: int, sharded: bool) -> Plan:
    """Builds the roles and counts.

    Args:
        model: the method; its roles are built on the CPU.
        batch_size: samples a device and update.
        devices: number of devices.
        sharded: whether weights, gradients and optimiser states are divided between them.
    """
    model.configure_model()
    shares = devices if sharded else 1
    evaluations = model.evaluations()
    roles = []
    for name, module in model.named_children():
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            continue
        count = evaluations.get(name)
        bytes_all = sum(p.numel() * p.element_size() for p in module.parameters())
        bytes_trained = sum(
            p.numel() * p.element_size() for p in module.parameters() if p.requires_grad
        )
        roles.append(
            RolePlan(
                role=name,
                parameters=sum(p.numel() for p in module.parameters()),
                trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
                weights=bytes_all // shares,
                gradients=bytes_trained // shares,
                optimizer=ADAM_STATES * bytes_trained // shares,
                forward=count.forward if count else 0,
                backward=count.backward if count else 0,
            )
        )
    return Plan(type(model).__name__, roles, batch_size, devices, sharded)


def format_plan(plan: Plan) -> str:
    """A table a person reads."""
    header = ("role", "parameters", "trainable", "weights", "gradients", "optimiser", "fwd", "bwd")
    rows: list[tuple[str, ...]] = [header]
    for role in plan.roles:
        share = role.trainable / role.parameters
        rows.append(
            (
                role.role,
                f"{role.parameters / 1e6:.3f} M",
                f"{share:.0%}",
                *(f"{b / MIB:.1f} MiB" for b in (role.weights, role.gradients, role.optimizer)),
                str(role.forward),
                str(role.backward),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    total = sum(role.total for role in plan.roles)
    forward = sum(role.forward for role in plan.roles)
    backward = sum(role.backward for role in plan.roles)
    kind = "sharded over" if plan.sharded else "replicated on"
    return "\n".join(
        [
            f"{plan.method}, {plan.batch_size} samples a device and update, "
            f"{kind} {plan.devices} device{'s' if plan.devices > 1 else ''}",
            "",
            *lines,
            "",
            f"Memory a device without activations: {total / MIB:.1f} MiB (with Adam's two states).",
            f"Network evaluations a sample and update: {forward} forward, {backward} backward.",
        ]
    )

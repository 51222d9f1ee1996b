"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scripts.plan.costs import Plan, RolePlan
from scripts.plan.host import HostMemory

HEADER = (
    "role",
    "parameters",
    "trainable",
    "weights",
    "gradients",
    "optimiser",
    "forward",
    "backward",
)
LABEL = 42  # characters


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan in plain values; bytes are those of one device."""
    return {
        **asdict(plan),
        "samples_per_update": plan.samples,
        "updates_per_epoch": plan.updates_per_epoch,
        "resident_bytes": plan.resident,
        "temporary_bytes": plan.temporary,
        "total_bytes": plan.total,
    }


def format_plan(plan: Plan) -> str:
    """A plan as lines for a terminal."""
    memory = _memory(plan), _host(plan.host)
    blocks = [_head(plan), _roles(plan.roles), *memory, _work(plan), _caveats(plan)]
    return "\n\n".join("\n".join(block) for block in blocks)


def size_text(count: int) -> str:
    """Bytes in MiB, or in GiB from one on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def count_text(count: float) -> str:
    """A large number with its SI prefix, such as ``1.02 G``."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= unit:
            return f"{count / unit:.3g} {prefix}"
    return f"{count:.3g} "


def _head(plan: Plan) -> list[str]:
    data = plan.data
    layout = "1 device"
    if plan.devices > 1:
        kind = "roles sharded (FSDP2)" if plan.strategy == "fsdp2" else "roles replicated (DDP)"
        if plan.replicas > 1:
            kind = f"{plan.replicas} copies of the roles, each sharded (FSDP2)"
        layout = f"{plan.devices} devices, {kind}"
    split = f", in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    if data.records is None:
        epoch = f"Updates an epoch: unknown ({data.unknown})."
    else:
        epoch = f"{data.records:,} records: {plan.updates_per_epoch:,.1f} updates an epoch."
    return [
        f"{plan.method}, {plan.precision}, {layout}",
        f"{plan.samples:,} samples an update, {data.batch_size:,} a device{split}. {epoch}",
    ]


def _cells(role: RolePlan) -> tuple[str, ...]:
    return (
        role.role,
        f"{role.parameters / 1e6:,.3f} M",
        f"{role.trainable / role.parameters:.0%}",
        *(size_text(count) for count in (role.weights, role.gradients, role.optimizer)),
        str(role.forward),
        str(role.backward),
    )


def _roles(roles: Sequence[RolePlan]) -> list[str]:
    rows = [HEADER, *map(_cells, roles)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _entry(label: str, value: str) -> str:
    return f"  {label:<{LABEL}}{value:>12}"


def _memory(plan: Plan) -> list[str]:
    lines = [
        "Memory a device",
        _entry("weights, gradients, optimiser", size_text(plan.resident)),
    ]
    if plan.gathered:
        lines.append(_entry("largest block, unsharded", size_text(plan.gathered)))
    if plan.step is not None:
        lines.append(_entry("activations, at most *", size_text(plan.step.activations)))
        for role, saved in plan.step.saved.items():
            lines.append(_entry(f"  saved for the {role}'s backward *", size_text(saved)))
        lines.append(
            _entry("or, after them, the update's workspace *", size_text(plan.step.workspace))
        )
    if plan.buckets:
        lines.append(_entry("  and the gradients being averaged", size_text(plan.buckets)))
    without = "" if plan.step is not None else " without activations"
    return [*lines, _entry(f"total{without}", size_text(plan.total))]


def _host(host: HostMemory) -> list[str]:
    ranks = "1 rank" if host.ranks == 1 else f"{host.ranks} ranks, each of which builds all roles"
    lines = [
        f"Memory of the host, a node ({ranks})",
        _entry("while building, roles in float32", size_text(host.building)),
    ]
    if host.text is not None:
        lines.append(_entry("text encoders, where prompts are encoded", size_text(host.text)))
    return lines


def _work(plan: Plan) -> list[str]:
    forward = sum(role.forward for role in plan.roles)
    backward = sum(role.backward for role in plan.roles)
    lines = [
        "Work a student update",
        f"  {forward} forward, {backward} backward network evaluations a sample, "
        f"{forward * plan.samples:,} and {backward * plan.samples:,} in all",
    ]
    if plan.step is not None:
        lines.append(
            f"  {count_text(plan.step.flops)}FLOP a device, "
            f"{count_text(plan.step.flops * plan.devices)}FLOP in all "
            f"(a multiply-add is two; matrix products, convolutions and attention)"
        )
    return lines


def _caveats(plan: Plan) -> list[str]:
    lines = list(plan.notes)
    if plan.step is not None:
        mixed = " Casts are the CPU's autocast's." if "mixed" in plan.precision else ""
        lines.append(
            "* Estimated, from a step on tensors without values, with the CPU's operations (its "
            f"attention is fused).{mixed} The rest is counted. The device's own context, the "
            "allocator's gaps and convolution workspaces come on top: leave a tenth free."
        )
    return lines

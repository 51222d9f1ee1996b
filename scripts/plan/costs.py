"""The parts of a plan and how they add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import lightning.pytorch as pl
from torch import nn

from fewstep.diffusion import Backbone
from fewstep.errors import FewstepError
from lightning_modules import FewStepModule
from scripts.plan.data import Data, data_of, example_batch
from scripts.plan.judges import decoder_on_meta
from scripts.plan.roles import build_without_weights
from scripts.plan.step import AUTOCAST, StepCost, step_cost

Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class RolePlan:
    """One role's share of the cost.

    Attributes:
        parameters, trainable: their number, over all devices.
        weights, gradients, optimizer: bytes a device.
        forward, backward: network evaluations a sample and student update.
    """

    role: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Plan:
    """The cost of an experiment.

    Attributes:
        precision: Lightning's name of it.
        accumulate: micro-batches an update.
        step: what the passes cost a device; None where they could not be tried.
        gathered: bytes of the largest part that FSDP2 has whole on a device at a time.
        buckets: bytes in which DDP averages gradients.
        notes: what else a reader must know, a sentence each.
    """

    method: str
    precision: str
    strategy: Strategy
    devices: int
    accumulate: int
    data: Data
    roles: list[RolePlan]
    step: StepCost | None
    gathered: int
    buckets: int
    notes: list[str]

    @property
    def resident(self) -> int:
        """Bytes a device keeps throughout: weights, gradients and optimiser states."""
        return sum(role.weights + role.gradients + role.optimizer for role in self.roles)

    @property
    def temporary(self) -> int:
        """Most bytes a device needs on top: the passes and the update take turns."""
        activations = self.step.activations if self.step else 0
        workspace = self.step.workspace if self.step else 0
        return max(activations, self.buckets + workspace) + self.gathered

    @property
    def total(self) -> int:
        """Most bytes a device needs."""
        return self.resident + self.temporary

    @property
    def samples(self) -> int:
        """Samples a student update, over all devices."""
        return self.data.batch_size * self.devices

    @property
    def updates_per_epoch(self) -> float | None:
        """Student updates in which every record is seen once."""
        return None if self.data.records is None else self.data.records / self.samples


def plan_of(
    model: FewStepModule,
    datamodule: pl.LightningDataModule | None = None,
    devices: int = 1,
    strategy: Strategy = "ddp",
    precision: str = "32-true",
) -> Plan:
    """Finds out what an experiment will cost, with neither weights nor a device.

    Args:
        model: the method; its roles are built here and hold no values.
        datamodule: its data; they are not read.
        devices: number of devices.
        strategy: whether roles are replicated or, by FSDP2, sharded.
        precision: Lightning's name of it.

    Raises:
        FewstepError: if the teacher's architecture is not to be found.
    """
    notes, data = build_without_weights(model, precision), data_of(datamodule)
    step: StepCost | None = None
    try:
        notes += decoder_on_meta(model)
        batch = partial(example_batch, model, datamodule, data.batch_size)
        step = step_cost(model, batch, precision, strategy == "fsdp2" and devices > 1)
    except (FewstepError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        notes.append(f"Activations and FLOPs are unknown, and Adam is assumed: {reason}.")
    if step is not None and step.guessed:
        notes.append(f"Two optimiser states a parameter are assumed for {', '.join(step.guessed)}.")
    shares = devices if strategy == "fsdp2" else 1
    if step is not None:
        step = replace(step, workspace=_share(step.workspace, shares))
    roles = [_role_plan(model, name, module, step, shares) for name, module in _roles(model)]
    gathered = _gathered(model, precision) if shares > 1 else 0
    averaged = max(role.gradients for role in roles) if devices > 1 and shares == 1 else 0
    return Plan(
        method=type(model).__name__,
        precision=precision,
        strategy=strategy,
        devices=devices,
        accumulate=model.accumulate,
        data=data,
        roles=roles,
        step=step,
        gathered=gathered,
        buckets=averaged,
        notes=notes,
    )


def _roles(model: FewStepModule) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if any(True for _ in module.parameters()):
            yield name, module


def _bytes(module: nn.Module, trainable: bool = False) -> int:
    return sum(
        p.numel() * p.element_size()
        for p in module.parameters()
        if p.requires_grad or not trainable
    )


def _role_plan(
    model: FewStepModule, name: str, module: nn.Module, step: StepCost | None, shares: int
) -> RolePlan:
    backbones = [m for m in module.modules() if isinstance(m, Backbone)]
    # What is in no backbone, such as the heads of a discriminator, stays replicated.
    whole = not backbones or (name in model.frozen_roles and not model.shard_frozen)
    shares = 1 if whole else shares
    trained = _bytes(module, trainable=True) if name in model.trained_roles else 0
    states = (step.optimizer if step else {}).get(name, 2 * trained)
    evaluations = model.evaluations().get(name)
    return RolePlan(
        role=name,
        parameters=sum(p.numel() for p in module.parameters()),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        weights=_share(_bytes(module), shares),
        gradients=_share(trained, shares),
        optimizer=_share(states, shares),
        forward=evaluations.forward if evaluations else 0,
        backward=evaluations.backward if evaluations else 0,
    )


def _share(count: int, shares: int) -> int:
    return -(-count // shares)


def _gathered(model: FewStepModule, precision: str) -> int:
    """The largest backbone's parts outside all units, and its largest unit."""
    found = [0]
    for backbone in (m for m in model.modules() if isinstance(m, Backbone)):
        units = [_bytes(backbone.get_submodule(name)) for name in backbone.shard_units]
        found.append(_bytes(backbone) - sum(units) + max(units, default=0))
    return max(found) // 2 if precision in AUTOCAST else max(found)

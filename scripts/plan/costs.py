"""The parts of a plan and how they add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import lightning.pytorch as pl
from torch import nn
from torch.nn import Parameter

from fewstep.errors import FewstepError
from lightning_modules import FewStepModule
from lightning_modules.optimisation import check_accumulate
from scripts.plan.data import Data, data_of, example_batch
from scripts.plan.host import HostMemory, host_memory
from scripts.plan.judges import decoder_on_meta
from scripts.plan.roles import build_without_weights
from scripts.plan.shards import gathered, sharded_roles, share
from scripts.plan.step import StepCost, gathered_in, step_cost

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
        replicas: copies of sharded roles, among which the devices are divided.
        accumulate: micro-batches an update.
        step: what the passes cost a device; None where they could not be tried.
        gathered: bytes of the largest part that FSDP2 has whole on a device at a time.
        buckets: bytes in which DDP averages gradients.
        host: what each machine's own memory holds.
        notes: what else a reader must know, a sentence each.
    """

    method: str
    precision: str
    strategy: Strategy
    devices: int
    replicas: int
    accumulate: int
    data: Data
    roles: list[RolePlan]
    step: StepCost | None
    gathered: int
    buckets: int
    host: HostMemory
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
    replicas: int = 1,
    devices_per_node: int = 8,
) -> Plan:
    """Finds out what an experiment will cost, with neither weights nor a device.

    Args:
        model: the method; its roles are built here and hold no values.
        datamodule: its data; they are not read.
        devices: number of devices.
        strategy: whether roles are replicated or, by FSDP2, sharded.
        precision: Lightning's name of it.
        replicas: copies of sharded roles, as :class:`~lightning_modules.parallel.ShardedStrategy`
            has them.
        devices_per_node: at most so many of them are in one machine.

    Raises:
        FewstepError: if the teacher's architecture is not to be found, the devices cannot be
            divided among so many copies, or a batch into so many parts.
    """
    shares = _shares(devices, strategy, replicas)
    notes, data = build_without_weights(model, precision), data_of(datamodule)
    if hasattr(datamodule, "batch_size"):
        check_accumulate(model.accumulate, data.batch_size)
    host = host_memory(model, min(devices, devices_per_node))
    step: StepCost | None = None
    try:
        notes += decoder_on_meta(model)
        batch = partial(example_batch, model, datamodule, data.batch_size)
        step = step_cost(model, batch, precision, shares > 1)
    except (FewstepError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        notes.append(f"Activations and FLOPs are unknown, and Adam is assumed: {reason}.")
    if step is not None and step.guessed:
        notes.append(f"Two optimiser states a parameter are assumed for {', '.join(step.guessed)}.")
    if step is not None:
        step = replace(step, workspace=-(-step.workspace // shares))
    roles = [_role_plan(model, name, module, step, shares) for name, module in _roles(model)]
    replicated = devices > 1 and strategy == "ddp"
    return Plan(
        method=type(model).__name__,
        precision=precision,
        strategy=strategy,
        devices=devices,
        replicas=replicas,
        accumulate=model.accumulate,
        data=data,
        roles=roles,
        step=step,
        gathered=gathered(model, gathered_in(precision)) if shares > 1 else 0,
        buckets=max(role.gradients for role in roles) if replicated else 0,
        host=host,
        notes=notes,
    )


def _shares(devices: int, strategy: Strategy, replicas: int) -> int:
    """Devices that a role is dealt out to."""
    if replicas > 1 and strategy == "ddp":
        raise FewstepError(
            "Replicated roles have a copy on each device; give --replicas with --strategy fsdp2."
        )
    if replicas < 1 or devices % replicas:
        raise FewstepError(
            f"{devices} devices cannot be divided among {replicas} copies; give --replicas a "
            "divisor of --devices."
        )
    return devices // replicas if strategy == "fsdp2" else 1


def _roles(model: FewStepModule) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if any(True for _ in module.parameters()):
            yield name, module


def _role_plan(
    model: FewStepModule, name: str, module: nn.Module, step: StepCost | None, shares: int
) -> RolePlan:
    shares = shares if name in sharded_roles(model) else 1
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    trained = trainable if name in model.trained_roles else []
    whole, part = share(trained, 1), share(trained, shares)
    states = (step.optimizer if step else {}).get(name, 2 * whole)
    evaluations = model.evaluations().get(name)
    return RolePlan(
        role=name,
        parameters=_count(module.parameters()),
        trainable=_count(trainable),
        weights=share(module.parameters(), shares),
        gradients=part,
        optimizer=-(-states * part // whole) if whole else 0,
        forward=evaluations.forward if evaluations else 0,
        backward=evaluations.backward if evaluations else 0,
    )


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

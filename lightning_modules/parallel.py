"""How roles live on several devices: replicated, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError
from fewstep.networks.gates import gates_of
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder
from lightning_modules.whole import load_whole


class ReplicatedStrategy(DDPStrategy):
    """Data parallelism in which every role averages its own gradients.

    It starts processes, places data and saves checkpoints as Lightning's ``ddp`` does, but leaves
    the module unwrapped (see :class:`~lightning_modules.gradients.GradientAverager`).
    """

    def configure_ddp(self) -> None:
        """Gives all ranks the first one's weights."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or, with ``replicas``, hybrid: sharded within groups of devices.

    Args:
        replicas: copies of the sharded model; the devices are divided among them. One node's
            devices a copy keep the heavy traffic inside the nodes.
        options: of Lightning's ModelParallelStrategy.
    """

    def __init__(self, replicas: int = 1, **options: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **options)
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Lays the devices out before Lightning does.

        Raises:
            FewstepError: if they cannot be divided among the replicas.
        """
        devices = self.num_nodes * self.num_processes
        if self.replicas < 1 or devices % self.replicas:
            raise FewstepError(
                f"{devices} devices cannot be divided among {self.replicas} copies; give "
                "trainer.strategy.replicas a divisor of the number of devices."
            )
        self._data_parallel_size = devices
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Loads a checkpoint, sharded or whole, after making sure that it is of this experiment.

        Raises:
            FewstepError: if it is of another one, or lacks what this run needs.
        """
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded_checkpoint(path):
            self.lightning_module.on_load_checkpoint(read_remainder(path))
        try:
            if path.is_file():
                return load_whole(path, self.lightning_module, self.optimizers)
            return super().load_checkpoint(path, weights_only)
        except (CheckpointException, RuntimeError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise FewstepError(f"'{path}' does not fit this run: {reason}") from error

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh roles are sharded over: ``(shards)`` or ``(replicas, shards)``."""
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        world = dist.get_world_size()
        return init_device_mesh(
            self.root_device.type,
            (self.replicas, world // self.replicas),
            mesh_dim_names=("replicas", "shards"),
        )


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers together: a module's parameters, without those of units within it.

    Attributes:
        module: whose they are.
        narrow: whether they are gathered, and computed with, in the run's low precision; the
            others stay float32.
        rest: whether it is what is left of a network, and so has units within.
    """

    module: nn.Module
    narrow: bool
    rest: bool = False


def units_of(role: nn.Module) -> Iterator[Unit]:
    """What is gathered of a role at a time, inside out.

    Backbones name their units (``shard_units``); a role that has more than a backbone, such as a
    discriminator's heads, may name some of that in the same way. What is left of each comes after
    its units. A role without any backbone has none: it stays replicated. Residual gates are units
    of their own, as alpha must not be rounded.
    """
    backbones = [module for module in role.modules() if isinstance(module, Backbone)]
    within = {id(parameter) for backbone in backbones for parameter in backbone.parameters()}
    headed = bool(backbones) and any(id(p) not in within for p in role.parameters())
    for backbone in backbones:
        for _, gate in gates_of(backbone):
            yield Unit(gate, narrow=False)
        for name in backbone.shard_units:
            yield Unit(backbone.get_submodule(name), narrow=True)
        yield Unit(backbone, narrow=not headed, rest=True)
    if headed:
        # One optimiser's parameters are either all sharded or not at all.
        for name in getattr(role, "shard_units", ()):
            yield Unit(role.get_submodule(name), narrow=False)
        yield Unit(role, narrow=False, rest=True)


def shard(
    role: nn.Module,
    mesh: DeviceMesh,
    low_precision: torch.dtype | None = None,
    averaged: bool = False,
) -> None:
    """Shards a role unit by unit (:func:`units_of`).

    Units are gathered for their own forward and backward passes and given back at once, so no
    stale copy of them is left when a pass went through them without gradient.

    Args:
        role: whose sharded parameters become DTensors.
        mesh: ``(shards)``, or ``(replicas, shards)`` for hybrid sharding.
        low_precision: what narrow units compute in; gradients are reduced in float32 all the same.
        averaged: whether the role is an average, which is updated shard by shard at any time.
    """
    # Inputs are left to autocast: in bfloat16, which cannot say 999, times would be others.
    narrow = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in list(units_of(role)):
        trained = any(parameter.requires_grad for parameter in unit.module.parameters())
        fully_shard(
            unit.module,
            mesh=mesh,
            mp_policy=narrow if unit.narrow else full,
            # A discriminator looks at the inside of a frozen backbone: gradient then enters below
            # its output, which is where what is left would have been gathered for the backward
            # pass.
            reshard_after_forward=not unit.rest or trained or averaged,
        )


StrategyRegistry.register("ddp", ReplicatedStrategy, override=True)
StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all devices")

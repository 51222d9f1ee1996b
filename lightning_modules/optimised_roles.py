"""The optimisation path that all methods share: whose gradient, clipping, steps, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.copies import crossing, units_within
from lightning_modules.finite import neutralise, skip_unless
from lightning_modules.gradients import GradientAverager, is_sharded, kept_out
from lightning_modules.groups import grouped, held
from lightning_modules.optimisation import check_accumulate, learning_rate_factor


class OptimisedRoles(pl.LightningModule):
    """Trains several roles, each with its own optimiser, in one manual optimisation.

    Args:
        optimizers: makes each trained role's optimiser from its parameters, in the order of steps.
        warmup_updates: student updates over which learning rates rise linearly.
        lr_decay: what learning rates do after the warm-up, until ``max_steps``.
        gradient_clip: largest gradient norm, for each role on its own; null is no clipping.

    Attributes:
        gates_lr: learning rate of residual gates, as a multiple of the other parameters'.
        gates_hold: updates in which they stay where they start, before that rate.
        clip_from: student updates before which gradients are not clipped.
        accumulate: micro-batches a batch is split into.
    """

    gates_lr: float = 1.0
    gates_hold: int = 0
    clip_from: int = 0
    accumulate: int = 1

    def __init__(
        self,
        optimizers: dict[str, OptimizerCallable],
        warmup_updates: int,
        lr_decay: Literal["constant", "cosine", "linear"],
        gradient_clip: float | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_optimizer = optimizers
        self.warmup_updates = warmup_updates
        self.lr_decay = lr_decay
        self.gradient_clip = gradient_clip
        self._averagers: dict[str, GradientAverager | None] = {}
        self._units: dict[str, list[FSDPModule]] = {}

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Roles with an optimiser."""
        return tuple(self.make_optimizer)

    def _backward(self, loss: Tensor, roles: Sequence[str], last: bool) -> None:
        """Adds a loss's gradient to its roles, and to no other."""
        own = [p for role in roles for p in self._parameters_of(role)]
        others = [p for r in self.trained_roles if r not in roles for p in self._parameters_of(r)]
        found = [self._averager(role) for role in roles] if last else []
        averagers = [averager for averager in found if averager is not None]
        for averager in averagers:
            averager.arm()
        if is_sharded(own) or is_sharded(others):
            with kept_out(others), self._crossing(roles, last):
                self.manual_backward(loss)
        else:
            # `inputs` keeps gradient out of every other role without toggling requires_grad.
            self.manual_backward(loss, inputs=own)
        for averager in averagers:
            averager.finish()

    def _crossing(self, roles: Sequence[str], last: bool) -> AbstractContextManager[None]:
        """A pass whose gradients cross between hybrid sharding's copies in its update's last."""
        if getattr(self.trainer.strategy, "replicas", 1) == 1:
            return nullcontext()
        if not self._units:
            self._units = {role: units_within(getattr(self, role)) for role in self.trained_roles}
        own = [unit for role in roles for unit in self._units[role]]
        rest = (units for role, units in self._units.items() if role not in roles)
        return crossing(own, [unit for units in rest for unit in units], last)

    def _averager(self, role: str) -> GradientAverager | None:
        """Averages what FSDP2 does not: replicated parameters, where there are several ranks."""
        if self.trainer.world_size == 1:
            return None
        if role not in self._averagers:
            replicated = [p for p in self._parameters_of(role) if not is_sharded([p])]
            self._averagers[role] = GradientAverager(replicated) if replicated else None
        return self._averagers[role]

    def _mean_over_ranks(self, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.trainer.world_size == 1:
            return logs
        # Not by the strategy's reduce, which has a barrier first: all would wait for their devices.
        values = torch.stack(list(logs.values()))
        dist.all_reduce(values)
        return dict(zip(logs, (values / self.trainer.world_size).unbind(), strict=True))

    def _step(self, role: str, optimizer: LightningOptimizer) -> Tensor:
        """Clips and steps one role; returns its gradient norm before clipping."""
        parameters = self._parameters_of(role)
        limit = float("inf")
        if self.gradient_clip is not None and self.global_step >= self.clip_from:
            limit = self.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # A NaN must not reach weights and averages before the host has looked at the losses.
        finite = neutralise([p.grad for p in parameters if p.grad is not None], norm)
        skip_unless(finite, optimizer.optimizer)
        if role == "student":
            optimizer.step()
        else:
            # Past the Lightning wrapper, which would count this step in `global_step`.
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None, model=self)
        optimizer.zero_grad(set_to_none=True)
        self._schedulers()[self.trained_roles.index(role)].step()
        return norm

    def configure_optimizers(self) -> Any:
        """One optimiser and learning-rate schedule a trained role, in the order of roles.

        Raises:
            FewstepError: if a batch is to be split into more parts than it has samples.
        """
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch_size is not None:
            check_accumulate(self.accumulate, batch_size)
        total = self.trainer.max_steps

        def factor(update: int) -> float:
            return learning_rate_factor(update, self.warmup_updates, total, self.lr_decay)

        optimizers = [
            grouped(self.make_optimizer[role], getattr(self, role), self.gates_lr)
            for role in self.trained_roles
        ]
        factors = [
            held(optimizer, getattr(self, role), factor, self.gates_hold)
            for optimizer, role in zip(optimizers, self.trained_roles, strict=True)
        ]
        return optimizers, list(map(LambdaLR, optimizers, factors))

    def _parameters_of(self, role: str) -> list[torch.nn.Parameter]:
        return [p for p in getattr(self, role).parameters() if p.requires_grad]

    def _optimizers(self) -> list[LightningOptimizer]:
        found = self.optimizers()
        return cast(list[LightningOptimizer], found if isinstance(found, list) else [found])

    def _schedulers(self) -> list[LambdaLR]:
        found = self.lr_schedulers()
        return cast(list[LambdaLR], found if isinstance(found, list) else [found])

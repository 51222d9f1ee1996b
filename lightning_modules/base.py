"""The base of every method: roles, one optimisation path, weight averaging, sampling.

A method says what it builds (:meth:`FewStepModule.build_roles`), what it draws
(:meth:`FewStepModule.draw`) and which losses follow (:meth:`FewStepModule.updates`). The rest is
here, once: accumulation, clipping, learning rates, EMA, counters, checkpoints, validation.

One batch is one student update, whatever the method: ``trainer.global_step`` counts student updates
and nothing else, so that ``max_steps``, checkpoints, logs and evaluations all mean the same.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, DenoiserLike, Guided, ode_sample
from fewstep.errors import FewstepError
from fewstep.networks import ema_update, warmed_up_decay
from fewstep.networks.loading import METADATA_KEY
from fewstep.seeding import torch_generator
from lightning_modules.checks import check_same_experiment, load_strictly
from lightning_modules.finite import neutralise, skip_unless
from lightning_modules.gradients import GradientAverager, is_sharded, kept_out
from lightning_modules.optimisation import Draws, learning_rate_factor, micro_batches
from lightning_modules.parallel import ShardedStrategy, shard
from lightning_modules.roles import Evaluations, Update, frozen, run_seed


class FewStepModule(pl.LightningModule):
    """Common ground of all methods.

    Args:
        optimizer: makes the student's optimiser from its parameters.
        warmup_updates: student updates over which learning rates rise linearly.
        lr_decay: what learning rates do after the warm-up, until ``max_steps``.
        gradient_clip: largest gradient norm, for each role on its own; null is no clipping.
        accumulate: micro-batches a batch is split into; one batch stays one update.
        ema_decay: decay of the student's average a student update; null keeps none.
        ema_warmup: lower the decay early on, to ``(1 + n) / (10 + n)``.
        sampling_guidance: guidance scale when sampling; 1 is off.
        step_counts: numbers of sampling steps to measure at; 1, 2, 4 and 8 by default, or the one
            number a phased student serves.
        compile_blocks: torch.compile each block of every network.
    """

    frozen_roles: ClassVar[tuple[str, ...]] = ()

    student: Denoiser
    ema: Denoiser | None

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        warmup_updates: int = 0,
        lr_decay: Literal["constant", "cosine", "linear"] = "constant",
        gradient_clip: float | None = 1.0,
        accumulate: int = 1,
        ema_decay: float | None = 0.999,
        ema_warmup: bool = True,
        sampling_guidance: float = 1.0,
        step_counts: list[int] | None = None,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trained_roles: tuple[str, ...] = ("student",)
        self.make_optimizer = {"student": optimizer}
        self.warmup_updates = warmup_updates
        self.lr_decay = lr_decay
        self.gradient_clip = gradient_clip
        self.accumulate = accumulate
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.sampling_guidance = sampling_guidance
        self.measured_steps = step_counts
        self.compile_blocks = compile_blocks
        self.provenance: dict[str, dict[str, str]] = {}
        self.loaded_metadata: dict[str, Any] | None = None
        self.training_cost: dict[str, Any] = {}
        self._averagers: dict[str, GradientAverager | None] = {}

    # ------------------------------------------------------------------ what a method provides

    @abstractmethod
    def build_roles(self) -> None:
        """Builds, loads and copies the networks, ``self.student`` among them."""

    @abstractmethod
    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """Draws all that is random in a step, each tensor ``(B, ...)``."""

    @abstractmethod
    def updates(self, batch: Batch, draws: Any) -> Iterator[Update]:
        """Yields each role's loss in turn; backward has run before the next is asked for."""

    @abstractmethod
    def evaluations(self) -> dict[str, Evaluations]:
        """Network evaluations a sample and student update, by role."""

    def sample_from(
        self,
        denoiser: DenoiserLike,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """How this method's student samples; by default along the probability-flow ODE."""
        times = denoiser.schedule.spaced_times(num_steps)
        return ode_sample(denoiser, noise, cond, times)

    def method_metadata(self) -> dict[str, Any]:
        """What of this method a checkpoint must record and agree on, as plain values."""
        return {}

    # ------------------------------------------------------------------ roles

    def configure_model(self) -> None:
        """Builds all roles, once: build, load, copy, average, compile."""
        if "student" in self._modules:
            return
        self.build_roles()
        self.ema = None
        if self.ema_decay is not None:
            self.ema = cast(Denoiser, frozen(copy.deepcopy(self.student).float()))
        for role in self.frozen_roles:
            frozen(getattr(self, role))
        if self.compile_blocks:
            self._compile()
        self._shard()

    def _shard(self) -> None:
        """Shards each role on its own, if the strategy asks for it."""
        if self._trainer is None or not isinstance(self._trainer.strategy, ShardedStrategy):
            return
        mesh, mixed = self._trainer.strategy.shard_mesh, self._trainer.precision == "bf16-mixed"
        for role in (*self.trained_roles, "ema", *self.frozen_roles):
            if getattr(self, role, None) is not None:
                low = torch.bfloat16 if mixed and role != "ema" else None
                shard(getattr(self, role), mesh, low)

    def _compile(self) -> None:
        for role in ("student", "ema", *self.frozen_roles):
            network = getattr(self, role)
            if isinstance(network, Denoiser):
                for name in network.backbone.feature_blocks:
                    network.backbone.get_submodule(name).compile()

    def train(self, mode: bool = True) -> FewStepModule:
        """Sets train mode, except for frozen and averaged roles."""
        super().train(mode)
        for role in ("ema", *self.frozen_roles):
            network = getattr(self, role, None)
            if network is not None:
                network.eval()
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch dimension."""
        return self.student.sample_shape

    @property
    def student_updates(self) -> int:
        """Optimiser updates the student has had."""
        return self.global_step

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One student update, and one of each other trained role."""
        draws = self._global_draws(batch)
        logs: dict[str, Tensor] = {}
        parts = list(micro_batches(batch, draws, self.accumulate))
        for number, (share, part, drawn) in enumerate(parts):
            for update in self.updates(part, drawn):
                self._backward(update.loss * share, update.role, last=number == len(parts) - 1)
                for name, value in update.logs.items():
                    logs[name] = logs.get(name, 0) + share * value.detach()
        logs = self._mean_over_ranks(logs)
        for role, optimizer in zip(self.trained_roles, self._optimizers(), strict=True):
            logs[f"{role}_grad_norm"] = self._step(role, optimizer)
        if self.ema is not None and self.ema_decay is not None:
            decay = self.ema_decay
            if self.ema_warmup:
                decay = warmed_up_decay(decay, self.student_updates)
            ema_update(self.ema, self.student, decay)
        self.log_dict({f"train/{name}": value for name, value in logs.items()})

    def _global_draws(self, batch: Batch) -> Draws:
        """This rank's rows of what is drawn for the batches of all ranks together.

        So a step draws the same for the same samples, on however many devices they are.
        """
        generator = self._generator("train", self.student_updates, 0)
        world, rank, size = self.trainer.world_size, self.global_rank, len(batch["sample"])
        if world == 1:
            return self.draw(batch, generator)
        shapes = batch["sample"][:1].expand(world * size, *batch["sample"].shape[1:])
        everyone: Batch = {**batch, "sample": shapes}
        return self.draw(everyone, generator).rows(slice(rank * size, (rank + 1) * size))

    def _backward(self, loss: Tensor, role: str, last: bool) -> None:
        """Adds a loss's gradient to its role, and to no other."""
        own = self._parameters_of(role)
        others = [p for r in self.trained_roles if r != role for p in self._parameters_of(r)]
        averager = self._averager(role) if last else None
        if averager is not None:
            averager.arm()
        if is_sharded(own) or is_sharded(others):
            with kept_out(others):
                self.manual_backward(loss)
        else:
            # `inputs` keeps gradient out of every other role without toggling requires_grad.
            self.manual_backward(loss, inputs=own)
        if averager is not None:
            averager.finish()

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
        values = self.trainer.strategy.reduce(torch.stack(list(logs.values())), reduce_op="mean")
        return dict(zip(logs, cast(Tensor, values).unbind(), strict=True))

    def _step(self, role: str, optimizer: LightningOptimizer) -> Tensor:
        """Clips and steps one role; returns its gradient norm before clipping."""
        parameters = self._parameters_of(role)
        limit = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # A NaN must not reach weights and averages before the host has looked at the losses; with
        # fp16 it is the scaler that skips the step, and it must see why.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
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
        """One optimiser and learning-rate schedule a trained role, in the order of roles."""
        total = self.trainer.max_steps

        def factor(update: int) -> float:
            return learning_rate_factor(update, self.warmup_updates, total, self.lr_decay)

        optimizers = [
            self.make_optimizer[role](self._parameters_of(role)) for role in self.trained_roles
        ]
        return optimizers, [LambdaLR(optimizer, factor) for optimizer in optimizers]

    def _parameters_of(self, role: str) -> list[torch.nn.Parameter]:
        return [p for p in getattr(self, role).parameters() if p.requires_grad]

    def _optimizers(self) -> list[LightningOptimizer]:
        found = self.optimizers()
        return cast(list[LightningOptimizer], found if isinstance(found, list) else [found])

    def _schedulers(self) -> list[LambdaLR]:
        found = self.lr_schedulers()
        return cast(list[LambdaLR], found if isinstance(found, list) else [found])

    def _generator(self, stream: str, *counters: int) -> torch.Generator:
        """Random numbers that depend on (seed, stream, counters) alone, for exact resume."""
        return torch_generator(run_seed(), stream, *counters, device=self.device)

    # ------------------------------------------------------------------ validation and sampling

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The training losses on held-out data, with the same draws at every validation."""
        draws = self.draw(batch, self._generator("validation", batch_idx, self.global_rank))
        for update in self.updates(batch, draws):
            values = {f"val/{name}": value for name, value in update.logs.items()}
            self.log_dict(values, batch_size=len(batch["sample"]), sync_dist=True)

    def sampling_roles(self) -> list[str]:
        """Roles that can sample, the default one first."""
        roles = ["ema"] if self.ema is not None else []
        return [*roles, "student", *(r for r in self.frozen_roles if r == "teacher")]

    def step_counts(self, role: str | None = None) -> list[int]:
        """The numbers of sampling steps to measure a role at, unless told otherwise."""
        return self.measured_steps or [1, 2, 4, 8]

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, guidance included."""
        return num_steps * (1 if self.guidance_scale(role) == 1 else 2)

    def guidance_scale(self, role: str | None = None) -> float:
        """The guidance scale a role samples with; 1 is off."""
        return self.sampling_guidance

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: torch.Generator | None = None,
        role: str | None = None,
    ) -> Tensor:
        """Turns noise ``(B, ...)`` into samples.

        Args:
            noise: standard normal noise.
            cond: conditioning under the backbone's argument names.
            num_steps: sampling steps.
            generator: for samplers that draw, on the noise's device.
            role: whose weights; the averaged student by default. ``teacher`` follows the ODE.

        Raises:
            FewstepError: for a role that cannot sample, or a step count the student cannot serve.
        """
        roles = self.sampling_roles()
        role = roles[0] if role is None else role
        if role not in roles:
            raise FewstepError(f"'{role}' cannot sample in this run; choose from {roles}.")
        denoiser = Guided(getattr(self, role), self.guidance_scale(role))
        if role == "teacher":
            return FewStepModule.sample_from(self, denoiser, noise, cond, num_steps, generator)
        return self.sample_from(denoiser, noise, cond, num_steps, generator)

    def decode(self, x0: Tensor) -> Tensor:
        """Samples to pixels in [-1, 1]; pixel-space models only clamp."""
        return x0.clamp(-1, 1) if x0.ndim > 2 else x0

    # ------------------------------------------------------------------ checkpoints

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of itself, in plain values."""
        return {
            "format": 1,
            "method": type(self).__name__,
            "denoiser": self.student.to_spec(),
            "frozen": self.provenance,
            "student_updates": self.student_updates,
            **self.method_metadata(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the metadata that loading checks and rebuilds from; callbacks may add theirs."""
        checkpoint.setdefault(METADATA_KEY, {}).update(self.metadata())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another experiment, naming the difference."""
        stored = checkpoint.get(METADATA_KEY)
        check_same_experiment(stored, self.metadata())
        self.loaded_metadata = stored

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without frozen roles, whose source and hash are in the metadata."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        hidden = tuple(f"{prefix}{role}." for role in self.frozen_roles)
        for name in [n for n in state if n.startswith(hidden)] if hidden else []:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads all but the frozen roles; anything else missing or unknown is an error."""
        return load_strictly(super().load_state_dict, state_dict, self.frozen_roles, assign)

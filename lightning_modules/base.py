"""The base of every method: roles, one optimisation path, weight averaging.

A method says what it builds (:meth:`FewStepModule.build_roles`), what it draws
(:meth:`FewStepModule.draw`) and which losses follow (:meth:`FewStepModule.updates`). The rest is
here, once: accumulation, clipping, learning rates, EMA, counters, validation. What is not of the
training step is in :mod:`lightning_modules.sampling`, :mod:`lightning_modules.recorded` and
:mod:`lightning_modules.built`.

One batch is one student update, whatever the method: ``trainer.global_step`` counts student updates
and nothing else, so that ``max_steps``, checkpoints, logs and evaluations all mean the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from fewstep.batches import in_shape_of
from fewstep.contracts import Batch
from fewstep.errors import FewstepError, require_at_least
from fewstep.networks import ema_update, warmed_up_decay
from fewstep.networks.gates import ResidualGates
from fewstep.networks.lora import LoRA
from fewstep.seeding import global_generators, torch_generator
from lightning_modules.built import BuiltRoles, Trained
from lightning_modules.conditioning import in_float32
from lightning_modules.optimisation import (
    BLOCK,
    Draws,
    in_blocks,
    micro_batches,
    noise_in_blocks,
)
from lightning_modules.roles import Evaluations, Update, run_seed

Turn = Callable[[Batch, Any], Iterator[Update]]


class FewStepModule(BuiltRoles):
    """Common ground of all methods.

    Args:
        optimizer: makes the student's optimiser from its parameters.
        warmup_updates: student updates over which learning rates rise linearly.
        lr_decay: what learning rates do after the warm-up, until ``max_steps``.
        gradient_clip: largest gradient norm, for each role on its own; null is no clipping.
        clip_from: student updates before which nothing is clipped.
        accumulate: micro-batches a batch is split into; one batch stays one update.
        ema_decay: decay of the student's average a student update; null keeps none.
        ema_warmup: lower the decay early on, to ``(1 + n) / (10 + n)``.
        sampling_guidance: guidance scale when sampling; 1 is off.
        step_counts: numbers of sampling steps to measure at; 1, 2, 4 and 8 by default, or the one
            number a phased student serves.
        compile_blocks: torch.compile each block of every network.
        checkpoint_activations: keep only the blocks' inputs for the backward pass and compute the
            rest once more: less memory for about a third more time.
        frozen_precision: what frozen roles are kept in. bfloat16 halves their memory, and their
            time where the run itself is not in bf16-mixed; what they predict is still read, and
            compared, in float32.
        shard_frozen: under FSDP2, shard frozen roles too; otherwise each device has them whole,
            which takes memory and saves gathering them for every evaluation.
        lora: train adapters on the network the student starts from, instead of a copy of it. Base,
            teacher and average are then one network, and checkpoints hold the adapters alone.
        gates: learnable gates on the student's residual branches or blocks (Neural Residual
            Diffusion), which are trained, averaged and saved with it; merged by ``fewstep export``.
            Not together with ``lora``.
        gates_lr: their learning rate, as a multiple of the other parameters'; 0 holds
            them where they start. They have no weight decay, as that would pull alpha to 1.
        gates_hold: student updates in which gates stay where they start while all else is trained.
        train_only: ``gates`` trains the student's gates alone and leaves its other weights as they
            are; the student may also have brought its gates with it.
        pipeline: folder of the diffusers pipeline whose text encoders and VAE encode prompts and
            pixels and decode samples; the teacher's by default.
        encoder_precision: what these compute in.
        offload_encoders: put text encoders back on the CPU after each use.
        vae_tiling: let the VAE work tile by tile on samples that are larger than a tile of its own:
            less memory; pixels change a little where tiles meet.
        vae_slicing: let the VAE encode one sample of a batch at a time: less memory, the same
            numbers. Samples are decoded one at a time in any case.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = AdamW,
        warmup_updates: int = 0,
        lr_decay: Literal["constant", "cosine", "linear"] = "constant",
        gradient_clip: float | None = 1.0,
        clip_from: int = 0,
        accumulate: int = 1,
        ema_decay: float | None = 0.999,
        ema_warmup: bool = True,
        sampling_guidance: float = 1.0,
        step_counts: list[int] | None = None,
        compile_blocks: bool = False,
        checkpoint_activations: bool = False,
        frozen_precision: Literal["float32", "bfloat16"] = "float32",
        shard_frozen: bool = True,
        lora: LoRA | None = None,
        gates: ResidualGates | None = None,
        gates_lr: float = 1.0,
        gates_hold: int = 0,
        train_only: Trained = "all",
        pipeline: str | None = None,
        encoder_precision: Literal["float32", "bfloat16", "float16"] = "float32",
        offload_encoders: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
    ) -> None:
        super().__init__({"student": optimizer}, warmup_updates, lr_decay, gradient_clip)
        require_at_least(0, clip_from=clip_from)
        if clip_from and gradient_clip is None:
            raise FewstepError(
                f"clip_from is {clip_from}, but nothing is clipped: set gradient_clip, or leave "
                "clip_from out."
            )
        self.clip_from = clip_from
        self.accumulate = accumulate
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.sampling_guidance = sampling_guidance
        self.measured_steps = step_counts
        self.compile_blocks = compile_blocks
        self.checkpoint_activations = checkpoint_activations
        self.frozen_precision = frozen_precision
        self.shard_frozen = shard_frozen
        self.lora = lora
        self.gates = gates
        self.gates_lr = gates_lr
        self.gates_hold = gates_hold
        self.train_only = train_only
        self.pipeline = pipeline
        self.encoder_precision = encoder_precision
        self.offload_encoders = offload_encoders
        self.vae_tiling = vae_tiling
        self.vae_slicing = vae_slicing
        self.companions = None
        self._shared = None
        self.provenance = {}
        self.loaded_metadata = None
        self.training_cost: dict[str, Any] = {}
        if lora is not None and (gates is not None or train_only == "gates"):
            raise FewstepError(
                "`lora` trains adapters beside a frozen network, and gates belong to one that is "
                "the student's own; leave out `lora`, or both `gates` and `train_only`."
            )
        for steps in step_counts or ():
            require_at_least(1, step_counts=steps)
        if gates_hold < 0:
            raise FewstepError(f"gates_hold is a number of updates from 0 on, not {gates_hold}.")
        if gates_hold > 0 and train_only == "gates":
            raise FewstepError(
                f"With train_only: gates nothing at all would be trained in the {gates_hold} "
                "updates of gates_hold. Leave out one of both."
            )

    # ------------------------------------------------------------------ what a method provides

    @abstractmethod
    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        """Draws all that is random in a step, each tensor ``(B, ...)``."""

    @abstractmethod
    def updates(self, batch: Batch, draws: Any) -> Iterator[Update]:
        """Yields each role's loss in turn; backward has run before the next is asked for."""

    @abstractmethod
    def evaluations(self) -> dict[str, Evaluations]:
        """Network evaluations a sample and student update, by role."""

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One student update, and one of each other trained role.

        What layers draw by themselves, such as the masks of dropout, depends on (seed, update,
        rank) alone, as all else does that is random: so a resumed run draws it again.
        """
        counters = self.student_updates, self.global_rank
        with global_generators(run_seed(), "layers", *counters, device=self.device):
            self._train_on(batch)

    def _train_on(self, batch: Batch) -> None:
        batch = self._encoded(batch, "train-latents", self.student_updates)
        draws = self._draws(batch, "train", self.student_updates)
        logs: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        optimizers = dict(zip(self.trained_roles, self._optimizers(), strict=True))
        parts = list(micro_batches(batch, draws, self.accumulate))
        for turn in self.turns():
            trained: set[str] = set()
            for number, (share, part, drawn) in enumerate(parts):
                for update in turn(part, drawn):
                    roles, last = (update.role, *update.also), number == len(parts) - 1
                    self._backward(update.loss * share, roles, last)
                    trained.update(roles)
                    for name, value in update.logs.items():
                        logs[name] = logs.get(name, 0) + share * value.detach()
            for role in filter(trained.__contains__, self.trained_roles):
                norms[f"{role}_grad_norm"] = self._step(role, optimizers[role])
        logs = {**self.to_log(self._mean_over_ranks(logs)), **norms}
        if self.ema is not None and self.ema_decay is not None:
            decay = self.ema_decay
            if self.ema_warmup:
                decay = warmed_up_decay(decay, self.student_updates)
            ema_update(self.ema, self.student, decay)
        self.after_update()
        self.log_dict({f"train/{name}": value for name, value in logs.items()})

    def turns(self) -> Sequence[Turn]:
        """Losses between which optimisers step, in turn; by default all roles step together.

        Each turn goes through all micro-batches before the roles it trains are stepped.
        """
        return (self.updates,)

    def to_log(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged of the updates' logs, means over the samples of all ranks."""
        return means

    def after_update(self) -> None:
        """What a method does once all its roles have been updated; nothing by default."""

    def _draws(self, batch: Batch, stream: str, number: int) -> Draws:
        """What is drawn for this rank's samples: the same on however many devices they are."""
        shape = in_shape_of(batch, BLOCK)
        return in_blocks(
            self._places(batch),
            lambda block: self.draw(shape, self._generator(stream, number, block)),
        )

    def _places(self, batch: Batch) -> range:
        """Where this rank's samples are among those of all ranks.

        Counted in whole batches, so that no two samples share a place where some ranks' are short.
        """
        size = len(batch["sample"])
        data = getattr(self.trainer, "datamodule", None)
        first = self.global_rank * max(size, getattr(data, "batch_size", size))
        return range(first, first + size)

    def _encoded(self, batch: Batch, stream: str, number: int) -> Batch:
        """A batch of latents and embeddings, where the data are pixels and prompts."""
        batch = {**batch, "cond": in_float32(batch["cond"])}
        if self.companions is None:
            return batch
        places = self._places(batch)

        def drawn(block: int) -> Tensor:
            shape, generator = (BLOCK, *self.sample_shape), self._generator(stream, number, block)
            return torch.randn(shape, generator=generator, device=self.device)

        def noise() -> Tensor:
            return noise_in_blocks(places, drawn)

        sample = self._latents(batch, noise)
        prompts, backbone = batch.get("prompt"), self.student.backbone
        cond = self.companions.with_prompts(batch["cond"], prompts, backbone)
        return {**batch, "sample": sample, "cond": cond}

    def _latents(self, batch: Batch, noise: Callable[[], Tensor]) -> Tensor:
        """Latents of a batch's pixels; latents stay as they are."""
        assert self.companions is not None
        return self.companions.latents(batch["sample"], self.sample_shape, noise)

    def _generator(self, stream: str, *counters: int) -> torch.Generator:
        """Random numbers that depend on (seed, stream, counters) alone, for exact resume."""
        return torch_generator(run_seed(), stream, *counters, device=self.device)

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The training losses on held-out data, with the same draws at every validation."""
        batch = self._encoded(batch, "validation-latents", batch_idx)
        draws = self._draws(batch, "validation", batch_idx)
        logs: dict[str, Tensor] = {}
        for share, part, drawn in micro_batches(batch, draws, self.accumulate):
            for update in self.updates(part, drawn):
                for name, value in update.logs.items():
                    logs[f"val/{name}"] = logs.get(f"val/{name}", 0) + share * value.detach()
        self.log_dict(logs, batch_size=len(batch["sample"]), sync_dist=True)

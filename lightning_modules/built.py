"""How roles come into being: built, gated, averaged, checkpointed, compiled, sharded."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Literal, Self, cast

import torch
from torch import nn

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of, find_folder
from fewstep.networks.gates import (
    GateTable,
    ResidualGates,
    apply_gates,
    gate_parameters,
    is_gated,
)
from fewstep.networks.gates.starts import is_asleep
from fewstep.networks.lora import LoRA, SharedBase, share_base
from fewstep.seeding import derived_seed
from lightning_modules.companions import Companions
from lightning_modules.parallel import ShardedStrategy, shard
from lightning_modules.preparation import (
    check_precision,
    checkpoint_activations,
    compile_blocks,
    keep_in,
)
from lightning_modules.roles import frozen, run_seed
from lightning_modules.steered_roles import SteeredRoles

Trained = Literal["all", "gates"]


class BuiltRoles(SteeredRoles):
    """Roles that are built once, from what a method says and from the options of all methods.

    Their meaning is told where they are given, see :class:`~lightning_modules.base.FewStepModule`.
    """

    ema_decay: float | None
    compile_blocks: bool
    checkpoint_activations: bool
    frozen_precision: Literal["float32", "bfloat16"]
    shard_frozen: bool
    lora: LoRA | None
    gates: ResidualGates | None
    train_only: Trained
    pipeline: str | None
    encoder_precision: Literal["float32", "bfloat16", "float16"]
    offload_encoders: bool
    vae_tiling: bool
    vae_slicing: bool
    _shared: SharedBase | None

    @abstractmethod
    def build_roles(self) -> None:
        """Builds, loads and copies the networks, ``self.student`` among them."""

    def configure_model(self) -> None:
        """Builds all roles, once: build, load, copy, gate, average, checkpoint, compile, shard.

        Raises:
            FewstepError: for a precision in which averages and optimisers would lose updates, and
                for gates that cannot be added or trained.
        """
        if "student" in self._modules:
            return
        if self._trainer is not None:
            check_precision(str(self._trainer.precision))
        # Lightning calls this with the accelerator as the default device. Strategies move the roles
        # there later; schedules stay on the host, and what starts at random is the same everywhere.
        with torch.device("cpu"):
            self._build()
        if self._trainer is not None and isinstance(self._trainer.strategy, ShardedStrategy):
            self._shard(self._trainer.strategy, str(self._trainer.precision) == "bf16-mixed")

    def _build(self) -> None:
        """All roles, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            # What starts at random does so alike on all ranks, whatever else was drawn there.
            torch.manual_seed(derived_seed(run_seed(), "roles"))
            self.build_roles()
        self._gate_student()
        self._find_companions()
        self.ema = None if self.ema_decay is None else self._average_of_student()
        for role in self.frozen_roles:
            keep_in(frozen(getattr(self, role)), getattr(torch, self.frozen_precision))
        for name, network in self._roles():
            if self.checkpoint_activations and name != "ema":
                checkpoint_activations(network)
            if self.compile_blocks:
                compile_blocks(network)

    def start_student(self, source: Denoiser) -> None:
        """Builds the student from a frozen network: a copy of it, or adapters on it.

        With adapters, the network becomes the role ``teacher``, which holds it.
        """
        if self.lora is None:
            self.student = copy.deepcopy(source).requires_grad_(True)
            return
        self._shared = share_base(source, self.lora, run_seed())
        self.teacher, self.student = self._shared.teacher, self._shared.student

    def _gate_student(self) -> None:
        """Gives the student its gates, and leaves nothing else of it to train where asked to."""
        if self.gates is not None:
            if is_gated(self.student):
                raise FewstepError(
                    "The network that the student starts from has residual gates already, which "
                    "the student has too and trains; leave out `gates`."
                )
            copied_from = self.provenance.get("start") or self.provenance.get("teacher")
            if copied_from is not None and self.gates.init != "identity":
                raise FewstepError(
                    f"gates.init {self.gates.init} would change what the network computes that the "
                    f"student was copied from ({copied_from['source']}), and so spoil its trained "
                    "weights. Set gates.init: identity; other starts are for training from scratch."
                )
            self._show(apply_gates(self.student, self.gates))
        if self.train_only == "gates":
            self._check_gates_alone()
            self.student.requires_grad_(False)
            for parameter in gate_parameters(self.student):
                parameter.requires_grad_(True)

    def _show(self, table: GateTable) -> None:
        """Says once, before training, where gates are: a pattern may match what was not meant."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if table.rows:
            print(f"Gates on the student:\n{table.overview}", flush=True)

    def _check_gates_alone(self) -> None:
        """Refuses to train gates alone where that would train nothing, or not all that is new."""
        if not is_gated(self.student):
            raise FewstepError(
                "train_only: gates leaves nothing to train, as the student has no gates. Set "
                "`gates`, with a mode other than none, or train_only: all."
            )
        if is_asleep(self.student):
            raise FewstepError(
                "train_only: gates would never train them, as no residual branch of this network "
                "does anything yet. Start from trained weights, or set train_only: all."
            )
        added = self.student.backbone.added_layer
        if added is not None:
            raise FewstepError(
                f"train_only: gates leaves out '{added}', the new input for the guidance scale, "
                "which would stay without effect. Set train_only: all, or guidance_embedding: "
                "false."
            )

    def _average_of_student(self) -> Denoiser:
        if self._shared is None:
            return cast(Denoiser, frozen(copy.deepcopy(self.student).float()))
        self._shared.ema.alpha_floor = self.student.alpha_floor
        return self._shared.ema

    def _find_companions(self) -> None:
        """Text encoders and VAE of the pipeline that was named, or else the teacher's."""
        origins = [origin.get("pipeline") for origin in self.provenance.values()]
        folder = self.pipeline or next(filter(None, origins), None)
        if folder is not None and family_of(find_folder(folder)).latent:
            dtype = getattr(torch, self.encoder_precision)
            self.companions = Companions(
                find_folder(folder),
                dtype,
                self.offload_encoders,
                self.vae_tiling,
                self.vae_slicing,
            )

    def _roles(self) -> list[tuple[str, nn.Module]]:
        """The networks that there are, by role: trained, averaged, frozen."""
        names = (*self.trained_roles, "ema", *self.frozen_roles)
        found = [(name, getattr(self, name, None)) for name in names]
        return [(name, role) for name, role in found if role is not None]

    def _shard(self, strategy: ShardedStrategy, mixed: bool) -> None:
        """Shards each role on its own."""
        mesh = strategy.shard_mesh
        for name, network in self._roles():
            if name not in self.frozen_roles or self.shard_frozen:
                averaged = name == "ema"
                shard(network, mesh, torch.bfloat16 if mixed and not averaged else None, averaged)

    def train(self, mode: bool = True) -> Self:
        """Sets train mode, except for frozen and averaged roles."""
        super().train(mode)
        for role in ("ema", *self.frozen_roles):
            network = getattr(self, role, None)
            if network is not None:
                network.eval()
        return self

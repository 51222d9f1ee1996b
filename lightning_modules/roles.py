"""Where roles come from and how they are kept."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.diffusion import Denoiser
from fewstep.networks import load_denoiser

TeacherSource = str | Callable[[], Denoiser]


@dataclass(frozen=True)
class Update:
    """One optimiser's share of a training step.

    Attributes:
        role: whose parameters the loss trains.
        loss: scalar with a graph.
        logs: detached scalars to log, by name.
    """

    role: str
    loss: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluations:
    """Network evaluations a sample and student update: what a method costs."""

    forward: int
    backward: int = 0


def run_seed() -> int:
    """The run's seed, as ``seed_everything`` recorded it; 0 outside a run."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def frozen(module: nn.Module) -> nn.Module:
    """Switches a role to eval mode without gradients."""
    return module.requires_grad_(False).eval()


def load_teacher(source: TeacherSource) -> tuple[Denoiser, dict[str, str]]:
    """Builds a frozen teacher and says where it came from.

    Args:
        source: a checkpoint, a run's or an experiment's folder, or a factory of a denoiser.
    """
    if callable(source):
        teacher = copy.deepcopy(source())
        return teacher.requires_grad_(False).eval(), {"source": type(teacher.backbone).__name__}
    loaded = load_denoiser(source)
    provenance = {"source": loaded.source, "sha256": loaded.sha256, "weights": loaded.role}
    return loaded.denoiser, provenance

"""Where roles come from and how they are kept."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks import load_denoiser
from fewstep.networks.loading import is_checkpoint, on_its_own
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of, read_null
from fewstep.together import in_turn, same_everywhere


class Pretrained:
    """A diffusers pipeline as the source of a network, where its folder alone does not say enough.

    Args:
        folder: of the pipeline, or a name of the Hugging Face hub that is in its local cache.
        size: height and width of samples in pixels; what the pipeline was made for by default.
        frames: of videos, in pixels.
        empty: file of what the unconditional branch gets, as ``fewstep shards encode`` writes it
            (``empty.safetensors``), so that no text encoder need be loaded.
        negative_prompt: what the unconditional branch gets instead of the empty prompt, for all
            samples alike; encoded once.

    Raises:
        FewstepError: if both say what it gets.
    """

    def __init__(
        self,
        folder: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        empty: str | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        if empty is not None and negative_prompt is not None:
            raise FewstepError(
                "`empty` and `negative_prompt` both say what the unconditional branch gets; leave "
                "one of them out."
            )
        self.folder = folder
        self.size = size
        self.frames = frames
        self.empty = empty
        self.negative_prompt = negative_prompt

    def load(self) -> LoadedPipeline:
        """Loads the denoiser; text encoders and VAE wait until they are needed."""
        null = None if self.empty is None else read_null(self.empty)
        negative = self.negative_prompt
        return load_denoiser_of(self.folder, self.size, self.frames, null, negative_prompt=negative)


TeacherSource = str | Pretrained | Callable[[], Denoiser]


@dataclass(frozen=True)
class Update:
    """One optimiser's share of a training step.

    Attributes:
        role: whose parameters the loss trains.
        loss: scalar with a graph.
        logs: detached scalars to log, by name.
        also: further roles whose parameters it trains, such as a head on the student's output.
    """

    role: str
    loss: Tensor
    logs: dict[str, Tensor]
    also: tuple[str, ...] = ()


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


def is_pipeline(source: str) -> bool:
    """Whether this is a diffusers pipeline's folder, or looks like a name on the hub."""
    path = Path(source)
    if path.is_dir():
        return (path / "model_index.json").is_file()
    looks_local = source.startswith((".", "/", "~", "runs/")) or path.suffix == ".ckpt"
    return source.count("/") == 1 and not looks_local and not is_checkpoint(path)


def load_teacher(source: TeacherSource, role: str = "ema") -> tuple[Denoiser, dict[str, str]]:
    """Builds a frozen teacher and says where it came from; a collective.

    All ranks of a run build their roles together, so one of each machine may hash the files and
    encode the empty prompt for the others (:func:`~fewstep.together.in_turn`).

    Args:
        source: a checkpoint, a run's or an experiment's folder, a diffusers pipeline's folder or
            name, or a factory of a denoiser.
        role: whose weights of a checkpoint.

    Raises:
        FewstepError: on all ranks, if it cannot be read on one, or is not the same on all machines.
    """
    if callable(source):
        teacher = copy.deepcopy(source())
        return teacher.requires_grad_(False).eval(), {"source": type(teacher.backbone).__name__}
    if isinstance(source, str) and is_pipeline(source):
        source = Pretrained(source)
    named = source
    denoiser, origin = in_turn(
        lambda: _from_pipeline(named) if isinstance(named, Pretrained) else _trained(named, role)
    )
    same_everywhere(origin["sha256"], f"'{origin['source']}'")
    return denoiser, origin


def _from_pipeline(source: Pretrained) -> tuple[Denoiser, dict[str, str]]:
    pipeline = source.load()
    origin = {"source": pipeline.source, "sha256": pipeline.sha256, "weights": "pipeline"}
    if source.empty is not None:
        origin["empty"] = source.empty
    if source.negative_prompt is not None:
        origin["negative_prompt"] = source.negative_prompt
    return pipeline.denoiser, {**origin, "pipeline": str(pipeline.folder)}


def _trained(source: str, role: str) -> tuple[Denoiser, dict[str, str]]:
    loaded = load_denoiser(source, role)
    provenance = {"source": loaded.source, "sha256": loaded.sha256, "weights": loaded.role}
    if loaded.pipeline is not None:
        provenance["pipeline"] = loaded.pipeline
    return on_its_own(loaded.denoiser), provenance

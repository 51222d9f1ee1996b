"""What judges frames in a plan: its networks without weights, and the pictures it would look at."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from datamodules import Shards
from datamodules.fields import Latents
from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from fewstep.networks.folders import pixel_factors
from fewstep.networks.frames import FrameCondition, TextCondition
from fewstep.networks.frames.conditions import Cond
from lightning_modules import FewStepModule, FrameAdversary, MotionConsistencyDistillation

PUBLISHED_TEXT = {"laion/CLIP-ViT-g-14-laion2B-s34B-b88K": 1024}
"""Numbers in the embeddings of text encoders that need not be here to be planned with."""


class _Told(FrameCondition):
    """Stands for a text encoder, which is no part of a plan."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    @property
    def dim(self) -> int:
        return self._dim

    def __call__(self, cond: Cond, prompts: list[str] | None, device: torch.device) -> Tensor:
        return torch.zeros(len(prompts or ()), self.dim, device=device)


def without_weights(model: FewStepModule) -> list[str]:
    """Gives a frame adversary networks of the right sizes, before roles are built.

    Returns:
        what a reader must know about it.

    Raises:
        FewstepError: if nothing says how large they are.
    """
    adversary = adversary_of(model)
    if adversary is None:
        return []
    planned = copy.copy(adversary)
    planned.features = copy.deepcopy(adversary.features)
    note = planned.features.outline()
    notes = [note] if note else []
    if isinstance(adversary.condition, TextCondition):
        planned.condition = _Told(_text_dim(adversary.condition))
        notes.append(f"The heads' text encoder, '{adversary.condition.source}', is not counted.")
    assert isinstance(model, MotionConsistencyDistillation)
    model.adversary = planned
    return notes


def adversary_of(model: FewStepModule) -> FrameAdversary | None:
    """A method's frame adversary, if it has one."""
    return model.adversary if isinstance(model, MotionConsistencyDistillation) else None


def _text_dim(condition: TextCondition) -> int:
    try:
        return condition.dim
    except FewstepError:
        if condition.source not in PUBLISHED_TEXT:
            raise
        return PUBLISHED_TEXT[condition.source]


def decoder_of(model: FewStepModule) -> nn.Module | None:
    """The VAE through which an adversary looks at latents, if it does."""
    if adversary_of(model) is None or model.companions is None:
        return None
    vae: nn.Module = model.companions.codec.vae
    return vae


def decoder_on_meta(model: FewStepModule) -> list[str]:
    """Has the VAE through which an adversary looks at latents keep no values.

    Returns:
        what a reader must know about it.

    Raises:
        FewstepError: if there is no VAE where the pipeline is.
    """
    vae = decoder_of(model)
    if vae is None:
        return []
    vae.to("meta")
    size = sum(parameter.nbytes for parameter in vae.parameters()) / 2**20
    return [
        "Frames are decoded in the step, with gradient, which is counted; the VAE's own weights "
        f"({size:,.1f} MiB) are not."
    ]


def decoder_without_values(model: FewStepModule) -> None:
    """Brings such a VAE where fake tensors are, and keeps it there."""
    vae = decoder_of(model)
    if vae is not None and model.companions is not None:
        codec: Any = model.companions.codec
        vae.to_empty(device="cpu")
        codec.to = lambda device: codec  # moving what a graph holds already is an error


def judged(
    model: FewStepModule, data: pl.LightningDataModule | None, batch: Batch, per_video: int
) -> Batch:
    """A batch with what a method adds that starts from some samples and looks at pictures.

    Args:
        data: of the videos.
        batch: of zeros.
        per_video: pictures a video beside them, which are as large as its frames; 0 for none.
    """
    if not isinstance(model, MotionConsistencyDistillation):
        return batch
    size, share = len(batch["sample"]), model.generated_share
    latents = isinstance(data, Shards) and isinstance(data.sample, Latents)
    shape = model.sample_shape if latents else _pixel_shape(model)
    found: Batch = {
        **batch,
        "pixels": torch.zeros(size, *shape),
        "prompt": [""] * size,
        # Evenly spread, so that each micro-batch has its part.
        "generated": [int((row + 1) * share) > int(row * share) for row in range(size)],
    }
    if per_video:
        channels, _, *plane = _pixel_shape(model)
        found["images"] = {
            "sample": torch.zeros(size * per_video, channels, *plane),
            "cond": {n: c.repeat_interleave(per_video, 0) for n, c in batch["cond"].items()},
            "key": [""] * (size * per_video),
            "prompt": [""] * (size * per_video),
        }
    return found


def _pixel_shape(model: FewStepModule) -> Sequence[int]:
    """``(C, F, H, W)`` of a video in pixels."""
    if model.companions is None:
        return model.sample_shape
    _, frames, height, width = model.sample_shape
    time, space = pixel_factors(model.companions.folder)
    return 3, (frames - 1) * time + 1, height * space, width * space

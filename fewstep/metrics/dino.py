"""FD-DINOv2: a Frechet distance over features that were learned without labels."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Features, Samples
from fewstep.metrics.fid import ImageStatistics
from fewstep.metrics.frames import colours, each_frame
from fewstep.metrics.frechet import FrechetDistance
from fewstep.metrics.weights import load_model, model_folder, model_sha256

SIDE = 224  # of the images it takes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
OFFSET = 0.1  # by which the published network's grid of positions is off, see ``place_positions``


class DINOv2Features(Features):
    """DINOv2's class token after the last normalisation, ``features`` ``(B, D)`` or ``(B, F, D)``.

    Images are rounded to 8 bits, resized to 224 x 224 (bicubic, antialiased, not rounded again)
    and normalised as ImageNet: what EDM2's evaluation does, and dgm-eval but for Pillow's rounding.

    Args:
        model: a folder of the transformers model, or its name in the Hugging Face cache; nothing
            is downloaded.
        batch_size: images at once; results do not depend on it.
    """

    name = "dinov2"

    def __init__(self, model: str = "facebook/dinov2-large", batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self.network: Any = None

    def prepare(self) -> None:
        folder = model_folder(self.model)
        _check_kind(folder)
        model_sha256(folder)

    def load(self, device: torch.device) -> None:
        """Loads the network.

        Raises:
            FewstepError: if the model's folder is missing, damaged or of another network.
        """
        folder = model_folder(self.model)
        _check_kind(folder)
        from transformers import Dinov2Model  # noqa: PLC0415 - slow, and an extra

        network = load_model(Dinov2Model, folder).requires_grad_(False).eval()
        patch = int(network.config.patch_size)
        if SIDE % patch:
            raise FewstepError(f"'{folder}' has patches of {patch}, which do not tile {SIDE}.")
        positions = network.embeddings.position_embeddings
        placed = place_positions(positions, SIDE // patch)
        network.embeddings.position_embeddings = torch.nn.Parameter(placed, requires_grad=False)
        self.network = network.to(device)
        self.device = device
        self.sha256 = model_sha256(folder)[:16]

    def identity(self) -> Hashable:
        return (type(self), self.model)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        with full_float32(self.device):
            return {"features": each_frame(colours(samples.pixels), self._row, self.batch_size)}

    def _row(self, images: Tensor) -> Tensor:
        """``(N, D)`` of 8-bit images ``(N, 3, H, W)``."""
        assert self.network is not None, "load() comes first"
        return self.network(pixel_values=normalised(images)).last_hidden_state[:, 0]

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights_sha256": self.sha256,
            "pixels": "8-bit",
            "resize": f"{SIDE}, bicubic, antialiased, float",
            "normalisation": {"mean": list(MEAN), "std": list(STD)},
            "output": "class token after the last normalisation",
            "positions": "as published, offset 0.1",
            "precision": "float32, no TF32",
        }


def normalised(images: Tensor) -> Tensor:
    """8-bit images ``(N, 3, H, W)`` as the network takes them, ``(N, 3, 224, 224)``."""
    size = (SIDE, SIDE)
    pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True) / 255
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def place_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings ``(1, 1 + n n, D)`` for a grid of ``side`` by ``side`` patches.

    Published values come of the original code, which interpolates with a scale for
    ``side + 0.1`` patches. transformers takes ``side`` itself, which gives slightly different
    features; positions that fit the grid already it leaves alone.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    square = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / old
    placed = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, placed.flatten(2).mT], dim=1)


def _check_kind(folder: Path) -> None:
    """Makes sure that a folder holds a DINOv2 without registers.

    Raises:
        FewstepError: if it holds something else.
    """
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise FewstepError(
            f"The folder '{folder}' has no readable config.json ({error}). Get the whole model "
            "again, or name another folder as 'model'."
        ) from error
    if kind != "dinov2":
        raise FewstepError(
            f"The folder '{folder}' holds a model of type {kind!r}, not 'dinov2'. FD-DINOv2 looks "
            "through facebook/dinov2-large, without registers; name its folder as 'model'."
        )


class FDDINOv2(FrechetDistance):
    """Frechet distance over DINOv2 (Stein et al., NeurIPS 2023), ``fd_dinov2``.

    It agrees with human judgement of images better than FID does; its numbers are larger and not
    comparable with FIDs. Images only; for frames of videos use FrechetDistance over the features.

    Args:
        features: DINOv2; ViT-L/14 by default.
    """

    def __init__(self, features: DINOv2Features | None = None) -> None:
        super().__init__(features or DINOv2Features(), "fd_dinov2")

    def statistics(self) -> ImageStatistics:
        return ImageStatistics(self.output)

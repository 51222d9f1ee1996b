"""A Frechet distance of videos that sees more of their motion: over a self-supervised network.

Ge et al., "On the Content Bias in Frechet Video Distance" (CVPR 2024): features of networks that
learned to fill in masked video depend less on the content of single frames than I3D's. Their
published CD-FVD stands on VideoMAE-v2 ViT-g, fine-tuned on Something-Something v2; over any other
weights this is a distance of the same kind, with figures of its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.clip_networks import ClipFrechetDistance, ClipNetwork
from fewstep.metrics.frames import Preparation, check_model, one_by_one
from fewstep.metrics.weights import load_model, model_folder, model_sha256


class VideoMAEFeatures(ClipNetwork):
    """The mean of VideoMAE's last tokens; of a fine-tuned model, what its classifier sees.

    Frames are resized, cropped and normalised as the model's preprocessor_config.json says.

    Args:
        model: a transformers folder, or a name that is in the Hugging Face cache. A model that was
            fine-tuned on Something-Something v2, where classes are motions, sees motion best.
        stride: of the frames that the network sees: the first ones, as many as it takes.
        resolution: side of a square to crop and resize clips to first; None leaves them.
        batch_size: clips at once.
    """

    name = "videomae"

    def __init__(
        self,
        model: str = "MCG-NJU/videomae-large",
        stride: int = 1,
        resolution: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(stride, resolution, batch_size)
        self.model = model

    def prepare(self) -> None:
        check_model(self.model)

    def load(self, device: torch.device) -> None:
        """Loads the encoder, and a fine-tuned model's last normalisation.

        Raises:
            FewstepError: if the folder is missing, damaged or of another model.
        """
        folder = model_folder(self.model)
        self.preparation = Preparation.read(folder)
        network, self.fine_tuned = _encoder(folder)
        self.clip_length = int(network.config.num_frames)
        self.network = network.requires_grad_(False).eval().to(device)
        self.sha256 = model_sha256(folder)[:16]

    def identity(self) -> Hashable:
        return (type(self), self.model, self.cut())

    def embed(self, clips: Tensor) -> Tensor:
        frames = self.preparation(one_by_one(clips)).unflatten(0, (len(clips), clips.shape[2]))
        encoder = self.network.videomae if self.fine_tuned else self.network
        tokens = encoder(pixel_values=frames).last_hidden_state.mean(1)
        last = self.network.fc_norm if self.fine_tuned else None
        return tokens if last is None else last(tokens)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": Path(self.model).name,
            "weights_sha256": self.sha256,
            "fine_tuned": self.fine_tuned,
            "preparation": self.preparation.protocol(),
            **self.clip_protocol(),
        }


def _encoder(folder: Path) -> tuple[Any, bool]:
    """The model of a folder, and whether it was fine-tuned to tell classes apart."""
    from transformers import (  # noqa: PLC0415 - slow, and an extra
        VideoMAEConfig,
        VideoMAEForVideoClassification,
        VideoMAEModel,
    )

    config = VideoMAEConfig.from_pretrained(folder, local_files_only=True)
    fine_tuned = VideoMAEForVideoClassification.__name__ in (config.architectures or ())
    kind = VideoMAEForVideoClassification if fine_tuned else VideoMAEModel
    return load_model(kind, folder), fine_tuned


class FrechetVideoMAE(ClipFrechetDistance):
    """``frechet_videomae``: the Frechet distance over VideoMAE; or its control.

    Args:
        features: the network; VideoMAE-large by default.
        shuffle_frames: whether to measure the control, ``frechet_videomae_shuffled``: see
            :class:`ClipFrechetDistance`.
    """

    def __init__(
        self, features: VideoMAEFeatures | None = None, shuffle_frames: bool = False
    ) -> None:
        super().__init__(features or VideoMAEFeatures(), "frechet_videomae", shuffle_frames)

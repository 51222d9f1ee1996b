"""Features of Inception v3, which FID, KID, sFID and the Inception Score are defined by."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Features, Samples
from fewstep.metrics.frames import colours, each_frame
from fewstep.metrics.inception_network import InceptionNetwork, clean_bicubic, tensorflow_bilinear
from fewstep.metrics.weights import WeightFile, file_sha256, fill, read_state

Resize = Literal["torch_fidelity", "clean"]
WEIGHTS = WeightFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    source="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)
RESIZES = {"torch_fidelity": tensorflow_bilinear, "clean": clean_bicubic}
MEANING = {
    "torch_fidelity": "bilinear of TensorFlow 1, not antialiased",
    "clean": "bicubic, antialiased, float, cut to [0, 255]",
}


class InceptionFeatures(Features):
    """What torch-fidelity's Inception v3 gives, of images or of videos' frames.

    ``features`` ``(B, 2048)`` after the last pooling, ``logits_unbiased`` ``(B, 1008)`` and
    ``spatial`` ``(B, 2023)`` for sFID, or ``(B, F, ...)``. All come of one pass, so one network
    serves every metric. Pixels are rounded to 8 bits first, grey ones repeated as colours.

    Args:
        weights: path of the weights; the published file in PyTorch's cache by default, whose hash
            is checked.
        resize: to 299 x 299: ``torch_fidelity`` as TensorFlow 1 did and most published values
            mean, or ``clean`` as clean-fid does, whose values are called by that name.
        batch_size: images at once; results do not depend on it.
    """

    def __init__(
        self,
        weights: str | None = None,
        resize: Resize = "torch_fidelity",
        batch_size: int = 64,
    ) -> None:
        self.weights = weights
        self.resize: Resize = resize
        self.batch_size = batch_size
        self.name = "inception" if resize == "torch_fidelity" else f"inception_{resize}"
        self.network: InceptionNetwork | None = None

    def prepare(self) -> None:
        self._path()

    def _path(self) -> Path:
        named = self.weights is not None and Path(self.weights).name == WEIGHTS.name
        return WEIGHTS.locate(self.weights, WEIGHTS.sha256 if named else None)

    def load(self, device: torch.device) -> None:
        """Loads the network.

        Raises:
            FewstepError: if the weights are missing, damaged or of another network.
        """
        path = self._path()
        with torch.random.fork_rng(devices=[]):
            network = InceptionNetwork()
        fill(network, read_state(path), path)
        self.network = network.requires_grad_(False).eval().to(device)
        if device.type == "cpu":  # a third faster there
            self.network.to(memory_format=torch.channels_last)
        self.device = device
        self.sha256 = file_sha256(path)[:16]

    def identity(self) -> Hashable:
        path = Path(self.weights).expanduser() if self.weights else WEIGHTS.cached
        return (type(self), path.absolute(), self.resize)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        with full_float32(self.device):
            found = each_frame(colours(samples.pixels), self._row, self.batch_size)
        parts = found.split([2048, 1008, found.shape[-1] - 3056], dim=-1)
        return dict(zip(("features", "logits_unbiased", "spatial"), parts, strict=True))

    def _row(self, images: Tensor) -> Tensor:
        """All outputs of 8-bit images ``(N, 3, H, W)``, one beside the other."""
        assert self.network is not None, "load() comes first"
        resized = RESIZES[self.resize](images)
        if self.device.type == "cpu":
            resized = resized.contiguous(memory_format=torch.channels_last)
        return torch.cat(list(self.network(resized).values()), dim=1)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights_sha256": self.sha256,
            "pixels": "8-bit",
            "resize": MEANING[self.resize],
            "precision": "float32, no TF32",
        }


def value_name(value: str, features: Features) -> str:
    """What a value is called over given features: plain over Inception, ``clean_`` over clean."""
    if not isinstance(features, InceptionFeatures):
        return f"{value}_{features.name}"
    return value if features.resize == "torch_fidelity" else f"{features.resize}_{value}"

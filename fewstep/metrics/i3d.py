"""Frechet video distance (FVD) as StyleGAN-V measures it.

Unterthiner et al., "Towards Accurate Generative Models of Video" (2018); protocol and network file
of Skorokhodov et al., "StyleGAN-V" (CVPR 2022): the 400 outputs of a Kinetics I3D before its
softmax, 16 frames, 2048 clips on either side. FVD weighs frames far more than motion (Ge et al.,
"On the Content Bias in Frechet Video Distance", CVPR 2024): read it beside its shuffled control.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.clip_networks import ClipFrechetDistance, ClipNetwork
from fewstep.metrics.weights import WeightFile, file_sha256

FILE = WeightFile(
    "i3d_torchscript.pt",
    "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (linked by StyleGAN-V)",
)
FEWEST_FRAMES = 9  # fewer leave nothing to the network's last pooling
SIGNATURE = {"rescale", "resize", "return_features"}


class I3DFeatures(ClipNetwork):
    """The TorchScript I3D of StyleGAN-V: 400 values of each clip.

    A TorchScript file is a program: loading it can run code of whoever made it. Take it from a
    source that you trust and pin it by ``sha256``, which is checked before anything is loaded.

    Clips are shown as they come: frame rates and strides of data and samples must already agree.

    Args:
        weights: path of i3d_torchscript.pt; PyTorch's cache by default.
        sha256: of that file, or its first digits.
        clip_length: frames that the network sees, the first ones; at least 9.
        stride: of these frames in a clip.
        resolution: side of a square to crop and resize clips to before the network itself resizes
            them to 224 (Latte's protocol: 256); None leaves them as they are.
        batch_size: clips at once.
    """

    name = "i3d"

    def __init__(
        self,
        weights: str | None = None,
        sha256: str | None = None,
        clip_length: int = 16,
        stride: int = 1,
        resolution: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(stride, resolution, batch_size, clip_length)
        if self.clip_length < FEWEST_FRAMES:
            raise FewstepError(
                f"I3D sees at least {FEWEST_FRAMES} frames; 'clip_length' is {clip_length}."
            )
        self.weights = weights
        self.expected = sha256

    def prepare(self) -> None:
        FILE.locate(self.weights, self.expected)

    def load(self, device: torch.device) -> None:
        """Checks the hash, then loads the program.

        Raises:
            FewstepError: if the file is missing, not the expected one, damaged, or no I3D of this
                protocol.
        """
        path = FILE.locate(self.weights, self.expected)
        try:
            network: Any = torch.jit.load(path, map_location=device)
        except (RuntimeError, ValueError, OSError) as error:
            raise FewstepError(
                f"'{path}' cannot be read as TorchScript ({error}). The file may be cut short: "
                f"get it again from {FILE.source}."
            ) from error
        arguments = {argument.name for argument in network.forward.schema.arguments}
        if not arguments >= SIGNATURE:
            raise FewstepError(
                f"'{path}' is TorchScript, but not the I3D of StyleGAN-V, which takes "
                f"{', '.join(sorted(SIGNATURE))}. Get it from {FILE.source}."
            )
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.network = network.eval()
        self.sha256 = file_sha256(path)[:16]

    def identity(self) -> Hashable:
        return (type(self), self.weights, self.expected, self.cut())

    def embed(self, clips: Tensor) -> Tensor:
        return self.network(clips.float(), rescale=True, resize=True, return_features=True)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights_sha256": self.sha256,
            "call": "rescale, resize to 224, return_features",
            **self.clip_protocol(),
        }


class FVD(ClipFrechetDistance):
    """``fvd``: the Frechet distance over I3D; or its control, ``fvd_shuffled``.

    Published figures of "FVD16" take 2048 clips on either side. Values of different numbers of
    clips, strides or splits cannot be compared.

    Args:
        features: the I3D; StyleGAN-V's protocol by default.
        shuffle_frames: whether to measure the control: see :class:`ClipFrechetDistance`.
    """

    def __init__(self, features: I3DFeatures | None = None, shuffle_frames: bool = False) -> None:
        super().__init__(features or I3DFeatures(), "fvd", shuffle_frames)

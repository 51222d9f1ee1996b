"""LPIPS, a perceptual distance of two pictures: of pairs, and as the diversity of a set.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import (
    Better,
    Features,
    Metric,
    Reference,
    Samples,
    Statistics,
    numbers_of,
)
from fewstep.metrics.frames import check_pictures, one_by_one
from fewstep.metrics.pairs import PIXELS, Paired, PixelRows
from fewstep.metrics.rows import Rows
from fewstep.metrics.weights import WeightFile, file_sha256, fill, read_state
from fewstep.seeding import torch_generator

URL = "https://download.pytorch.org/models/"
BACKBONES = {
    "vgg": WeightFile("vgg16-397923af.pth", f"{URL}vgg16-397923af.pth", "397923af"),
    "alex": WeightFile("alexnet-owt-7be5be79.pth", f"{URL}alexnet-owt-7be5be79.pth", "7be5be79"),
}
CONDITION = "condition"
SMALLEST = 32  # pixels: AlexNet's pooling leaves nothing of less than 31, VGG16's of less than 16


class LPIPSFeatures(Features):
    """torchmetrics' LPIPS network; its linear weights come with torchmetrics.

    It gives nothing of single samples: distances are taken when the pairs are known.

    Args:
        net: the backbone. Published diversities use either: compare only those of one.
        weights: path of the backbone's torchvision weights; PyTorch's cache by default.
        batch_size: pictures of either side at once.
    """

    name = "lpips"

    def __init__(
        self,
        net: Literal["vgg", "alex"] = "vgg",
        weights: str | None = None,
        batch_size: int = 16,
    ) -> None:
        self.net = net
        self.weights = weights
        self.batch_size = batch_size
        self.network: Any = None

    def prepare(self) -> None:
        BACKBONES[self.net].locate(self.weights)

    def load(self, device: torch.device) -> None:
        """Loads backbone and linear layers.

        Raises:
            FewstepError: if the weights are missing, damaged or of another network.
        """
        from torchmetrics.functional.image.lpips import _LPIPS  # noqa: PLC0415 - slow to import

        path = BACKBONES[self.net].locate(self.weights)
        state = read_state(path)
        with torch.random.fork_rng(devices=[]):
            network = _LPIPS(net=self.net, pnet_rand=True)
        for part in network.net.children():
            for number, layer in part.named_children():
                start = f"features.{number}."
                mine = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
                fill(layer, mine, path)
        self.network = network.requires_grad_(False).eval().to(device)
        self.device = device
        self.sha256 = file_sha256(path)[:16]
        self.published = self.sha256.startswith(BACKBONES[self.net].sha256)

    def identity(self) -> Hashable:
        return (type(self), self.net, self.weights)

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        check_pictures(samples.pixels)
        if min(samples.pixels.shape[-2:]) < SMALLEST:
            raise FewstepError(
                f"LPIPS looks at pictures of at least {SMALLEST} pixels a side; these have "
                f"{tuple(samples.pixels.shape[-2:])}."
            )
        return {}

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """LPIPS ``(N,)`` of 8-bit images or videos ``(N, ...)``; of videos the mean of frames."""
        assert self.network is not None, "load() comes first"
        parts = zip(
            *(one_by_one(pixels).split(self.batch_size) for pixels in (first, second)),
            strict=True,
        )
        with full_float32(self.device):
            found = [self.network(self._ready(a), self._ready(b)).flatten() for a, b in parts]
        return torch.cat(found).view(len(first), -1).mean(1).cpu()

    def _ready(self, pixels: Tensor) -> Tensor:
        """Values in [-1, 1] and of three colours."""
        scaled = pixels.to(self.device).float() / 127.5 - 1
        return scaled.expand(-1, 3, -1, -1)

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "net": self.net,
            "weights_sha256": self.sha256,
            "published_weights": self.published,
            "linear_weights": "torchmetrics, LPIPS 0.1",
            "pixels": "8-bit, not resized",
        }


class PairedLPIPS(Paired):
    """Mean LPIPS of pairs of the same noise, ``paired_lpips``.

    Args:
        features: the LPIPS network; VGG16 by default.
        pairs: to compare; both sets' pixels are kept in memory.
    """

    features: LPIPSFeatures

    def __init__(self, features: LPIPSFeatures | None = None, pairs: int = 256) -> None:
        super().__init__("paired_lpips", PIXELS, "lower", pairs)
        self.features = features or LPIPSFeatures()

    def statistics(self) -> Rows:
        return PixelRows([PIXELS], self.pairs)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return self.features.distances(first, second)


class ConditionRows(PixelRows):
    """8-bit samples, and what was asked for as a number."""

    def update(self, features: Mapping[str, Tensor], samples: Samples) -> None:
        if samples.prompts is None:
            raise FewstepError(
                "Diversity of samples of the same prompt needs prompts, and these samples have "
                "none. Measure on data with prompts, or use among: all."
            )
        super().update({**features, CONDITION: numbers_of(samples.prompts)}, samples)


class LPIPSDiversity(Metric):
    """Mean LPIPS of two different samples of a set, ``lpips_diversity``.

    Fewer steps can mean less variety: pairs among all show what the whole set spans, those among
    samples of the same prompt what the noise alone does (``lpips_diversity_same_prompt``).

    Args:
        features: the LPIPS network; VGG16 by default.
        among: all samples, or those of the same prompt, which several must share.
        most: samples that pairs are formed of; their pixels are kept in memory.
        num_pairs: drawn without repetition by ``seed``; fewer if there are not as many.
        seed: of the pairs.
    """

    reference: ClassVar[Reference] = "none"
    features: LPIPSFeatures

    def __init__(
        self,
        features: LPIPSFeatures | None = None,
        among: Literal["all", "same_prompt"] = "all",
        most: int = 512,
        num_pairs: int = 1000,
        seed: int = 0,
    ) -> None:
        self.features = features or LPIPSFeatures()
        self.among = among
        self.most = most
        self.num_pairs = num_pairs
        self.seed = seed
        self.name = "lpips_diversity" if among == "all" else f"lpips_diversity_{among}"
        self.needs_prompts = among == "same_prompt"
        self.better: dict[str, Better] = {self.name: "higher"}

    def check(self, num_samples: int) -> None:
        if num_samples < 2:
            raise FewstepError(f"{self.name} compares two samples; draw more than {num_samples}.")

    def statistics(self) -> Rows:
        if self.among == "all":
            return PixelRows([PIXELS], self.most)
        return ConditionRows([PIXELS, CONDITION], self.most)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        first, second = torch.triu_indices(len(generated), len(generated), offset=1)
        if self.among == "same_prompt":
            condition = generated[CONDITION]
            same = condition[first] == condition[second]
            first, second = first[same], second[same]
        if not len(first):
            raise FewstepError(
                f"{self.name} needs two samples to compare, of one prompt where the pairs are of "
                "the same prompt. Draw more samples, or several of each prompt."
            )
        drawn = torch.randperm(len(first), generator=torch_generator(self.seed, "pairs"))
        pixels = generated[PIXELS]
        total, count = 0.0, min(self.num_pairs, len(first))
        for chosen in drawn[:count].split(64):  # the pairs' pixels are more than the samples'
            distances = self.features.distances(pixels[first[chosen]], pixels[second[chosen]])
            total += float(distances.double().sum())
        return {self.name: total / count}

    def protocol(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "among": self.among,
            "samples": self.most,
            "most_pairs": self.num_pairs,
            "seed": self.seed,
            "features": self.features.protocol(),
        }

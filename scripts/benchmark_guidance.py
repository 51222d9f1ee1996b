"""What random views cost: guided steps with K = 1, 10 and 20 views, as ratios measured in one run.

A denoiser of latents is guided through its own decoder by a CLIP of the same proportions as in
practice: the views are made of pixels that were decoded once, so only the guide sees K pictures.
Targets are encoded once, before the clock starts. Weights are random, and nothing is downloaded.

    python -m scripts.benchmark_guidance --size 64 --width 320 --vae 128 --guide 768 --pixels 224

A view's pass through the guide is 1 % of the U-Net's and the decoder's by operations, here (1.01 %)
as there (1.06 %, with ViT-B).

"decoded anew" is what guidance costs that decodes a picture for each view.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from fewstep.diffusion import Cond, Prediction, Schedule, VPSchedule, to_prediction
from fewstep.guidance import (
    DDIM,
    Capped,
    Decoded,
    DiffAugment,
    Energy,
    Guidance,
    PictureNetwork,
    Polyak,
    Target,
    guided_sample,
)
from fewstep.guidance.energies.base import needed
from fewstep.networks.latents import LatentCodec

VIEWS = (1, 10, 20)
TIMES = torch.tensor([600.0, 500.0, 400.0]).double()


class LatentDenoiser:
    """A U-Net of the layout of Stable Diffusion's, with random weights."""

    def __init__(self, width: int, device: str) -> None:
        self.schedule: Schedule = VPSchedule()
        network: Any = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=2 * width,
            attention_head_dim=8,
        )
        self.network = network.to(device).eval()
        self.text = torch.randn(1, 77, 2 * width, device=device)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        alpha, sigma = self.schedule.levels(t, x_t)
        eps = self.network(x_t, t, self.text.expand(len(x_t), -1, -1)).sample
        return to_prediction(eps, x_t, alpha, sigma, "epsilon")


@dataclass(frozen=True, eq=False)
class Cosine(Energy):
    """1 minus the cosine of a picture's embedding and its target."""

    network: PictureNetwork

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = needed(target, self, "embeddings", x0)
        return 1 - torch.cosine_similarity(self.network(x0), wanted, dim=1)


@dataclass(frozen=True, eq=False)
class Anew(Energy):
    """The same energy, which decodes each view by itself; of views of latents."""

    energy: Decoded

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        return self.energy(x0, target)


def decoder(width: int, device: str) -> LatentCodec:
    """A VAE of the layout of Stable Diffusion's."""
    vae: Any = AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return LatentCodec.of(vae.to(device).eval())


def vision(width: int, pixels: int, device: str) -> PictureNetwork:
    """A vision transformer of 12 blocks and 14 x 14 patches, as CLIP ViT-B/16 is."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(width // 64, 1),
        image_size=pixels,
        patch_size=pixels // 14,
        projection_dim=width // 2,
    )
    network: Any = CLIPVisionModelWithProjection(config)
    return PictureNetwork(network.to(device), size=(pixels, pixels))


def runs(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A short guided run for each number of views, and one that decodes each view."""
    denoiser = LatentDenoiser(options.width, options.device)
    network = vision(options.guide, options.pixels, options.device)
    energy = Decoded(Cosine(network), decoder(options.vae, options.device))
    noise = torch.randn(options.batch, 4, options.size, options.size, device=options.device)
    with torch.no_grad():
        target = network(torch.rand(options.batch, 3, 64, 64, device=options.device) * 2 - 1)

    def run(energy: Energy, copies: int) -> Callable[[], object]:
        rule = Capped(Polyak(0.01, "eps_norm"), 0.1)
        guidance = Guidance(energy, rule, augmentor=DiffAugment(copies))
        draws = [torch.Generator().manual_seed(row) for row in range(options.batch)]
        base = DDIM(1)
        return lambda: guided_sample(denoiser, noise, None, TIMES, guidance, target, draws, base)

    made = {f"K = {copies}": run(energy, copies) for copies in VIEWS}
    if options.anew:
        made["K = 10, decoded anew"] = run(Anew(energy), 10)
    return made


def measure(
    made: dict[str, Callable[[], object]], blocks: int, device: str
) -> dict[str, list[float]]:
    """Seconds a run of each, in turns; the first turn warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for block in range(blocks + 1):
        for name, run in made.items():
            started = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if block:
                times[name].append(time.perf_counter() - started)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the times and their ratios to one view."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=16, help="height and width of a latent")
    parser.add_argument("--width", type=int, default=64, help="of the U-Net; 320 in SD 1.5")
    parser.add_argument("--vae", type=int, default=32, help="width of the VAE; 128 in SD 1.5")
    parser.add_argument("--guide", type=int, default=32, help="of the guide; 768 in ViT-B")
    parser.add_argument("--pixels", type=int, default=56, help="side of what the guide sees")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--anew", action="store_true", help="also decode each view by itself")
    options = parser.parse_args(arguments)
    times = measure(runs(options), options.blocks, options.device)
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = found[f"K = {VIEWS[0]}"]
    steps = len(TIMES) - 1
    print(f"{steps} guided steps of {options.batch} samples on {options.device}")
    for name, seconds in found.items():
        print(f"{name:22s} {1000 * seconds / steps:9.1f} ms a step   {seconds / first:6.3f}")


if __name__ == "__main__":
    main()

"""What a step of adversarial PCM is measured on: sizes, network, data and draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks.families.stable_diffusion import StableDiffusion
from fewstep.seeding import torch_generator
from lightning_modules.phased_consistency_distillation import PhasedDraws

Dtype = Literal["fp32", "bf16"]
LATENT_CHANNELS, TOKENS = 4, 77
GRID_POINTS = 40
GUIDANCE = (5.0, 6.0)


@dataclass(frozen=True)
class Settings:
    """The size of what is measured.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, or ``bf16`` for bfloat16 autocast, in which our frozen base is kept too.
        plain_bases: what the straightforward side keeps both of its bases in under ``bf16``.
        channels: of the U-Net's levels; all but the last have attention to the text.
        text_width: channels of the text.
        latent: height and width of a latent.
        batch: samples a step.
        rank: of the LoRA.
        head_width, head_kernel: of the discriminator's heads.
        compiled: compile the blocks of all networks, on both sides.
        checkpoint: compute activations once more in the backward pass, on both sides.
        blocks: timed blocks of each side.
        steps: steps a block.
        threads: CPU threads; 0 is torch's own choice.
    """

    device: str = "cpu"
    dtype: Dtype = "fp32"
    plain_bases: Dtype = "fp32"
    channels: tuple[int, ...] = (64, 128, 256)
    text_width: int = 256
    latent: int = 32
    batch: int = 1
    rank: int = 16
    head_width: int = 64
    head_kernel: int = 3
    compiled: bool = False
    checkpoint: bool = False
    blocks: int = 3
    steps: int = 1
    threads: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent."""
        return LATENT_CHANNELS, self.latent, self.latent


def network(settings: Settings) -> Denoiser:
    """A U-Net of the asked size with the same random weights wherever it is made."""
    levels = len(settings.channels)
    config = {
        "sample_size": settings.latent,
        "block_out_channels": list(settings.channels),
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        "cross_attention_dim": settings.text_width,
    }
    null = (1, TOKENS, settings.text_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = StableDiffusion(config, settings.shape, {"encoder_hidden_states": null})
        made.fill_null({"encoder_hidden_states": torch.randn(null)})
    return Denoiser(made, VPSchedule(), "epsilon")


def random_batch(settings: Settings) -> Batch:
    """Noise for latents and for text."""
    draws, size = torch_generator(0, "adversarial"), settings.batch
    text = torch.randn(size, TOKENS, settings.text_width, generator=draws)
    return {
        "sample": torch.randn(size, *settings.shape, generator=draws).to(settings.device),
        "cond": {"encoder_hidden_states": text.to(settings.device)},
        "key": [""] * size,
    }


def random_draws(settings: Settings, update: int) -> PhasedDraws:
    """What a step draws, the same for both sides."""
    generator = torch_generator(0, "adversarial draws", update)
    size, low, high = settings.batch, *GUIDANCE
    noises = torch.randn(3, size, *settings.shape, generator=generator).to(settings.device)
    positions = torch.rand(2, size, generator=generator).to(settings.device)
    index = torch.randint(GRID_POINTS, (size,), generator=generator)
    return PhasedDraws(
        index=index.to(settings.device),
        noise=noises[0],
        guidance=low + (high - low) * positions[0],
        dropped=torch.zeros(size, dtype=torch.bool, device=settings.device),
        position=positions[1],
        fake_noise=noises[1],
        real_noise=noises[2],
    )

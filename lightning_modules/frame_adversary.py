"""Frame adversarial learning (MCM, section 3.2): single frames judged beside real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fewstep.contracts import Batch
from fewstep.diffusion.losses import (
    hinge_discriminator,
    linear_generator,
    non_saturating_discriminator,
    non_saturating_generator,
    one_centred_penalty,
)
from fewstep.errors import FewstepError
from fewstep.networks.frames import (
    NUM_UNIFORMS,
    DiffAugment,
    FrameCondition,
    FrameDiscriminator,
    FrozenFeatures,
)
from fewstep.networks.frames.heads import Normalisation
from fewstep.networks.latents import LatentCodec, chosen_frames

LOSSES = {
    "hinge": (linear_generator, hinge_discriminator),
    "non_saturating": (non_saturating_generator, non_saturating_discriminator),
}


@dataclass(frozen=True)
class Looks:
    """Pictures as the frozen network takes them, and what their heads are told.

    Attributes:
        prepared: ``(B * n, C, H, W)``, rows ``n i`` to ``n i + n - 1`` of sample ``i``.
        cond: ``(B * n, D)``, or None.
        each: ``n``.
    """

    prepared: Tensor
    cond: Tensor | None
    each: int

    def first(self, number: int) -> Tensor:
        """The first few pictures of each sample, ``(B * number, C, H, W)``."""
        return self.prepared.unflatten(0, (-1, self.each))[:, :number].flatten(0, 1)


class FrameAdversary:
    """A discriminator over a few frames of each video, through a frozen image network.

    Args:
        features: the frozen network (MCM: DINOv2 ViT-S/14).
        condition: what the heads are told of a picture (MCM: its caption's CLIP embedding); null
            tells nothing.
        real: whose pictures are real: frames of the batch's ``videos``, or the ``images`` beside
            them.
        num_frames: frames of each video that are looked at, drawn anew for each sample.
        weight: of the adversarial loss.
        loss: ``hinge``, which the released code calls "wgan", or ``non_saturating``.
        penalty: weight of the one-centred gradient penalty on features, which the released code
            calls "r1" (published: 1e-5); 0 is off.
        augment: which augmentations both sides get; an empty list for none.
        round_trip: put real pictures through the VAE too, so that nothing can be told by its marks.
        width, kernel, normalisation: see :class:`~fewstep.networks.frames.FrameDiscriminator`.
        checkpoint_decoder: compute the decoder's activations anew in the backward pass.
    """

    def __init__(
        self,
        features: FrozenFeatures,
        condition: FrameCondition | None = None,
        real: Literal["videos", "images"] = "videos",
        num_frames: int = 2,
        weight: float = 1.0,
        loss: Literal["hinge", "non_saturating"] = "hinge",
        penalty: float = 0.0,
        augment: tuple[str, ...] = ("color", "translation", "cutout"),
        round_trip: bool = False,
        width: int = 64,
        kernel: int = 9,
        normalisation: Normalisation = "group",
        checkpoint_decoder: bool = False,
    ) -> None:
        self.features = features
        self.condition = condition
        self.real = real
        self.num_frames = num_frames
        self.weight = weight
        self.generator_loss, self.discriminator_loss = LOSSES[loss]
        self.penalty = penalty
        self.augment = DiffAugment(tuple(augment))
        self.round_trip = round_trip
        self.make_heads = partial(
            FrameDiscriminator, width=width, kernel=kernel, normalisation=normalisation
        )
        self.checkpoint_decoder = checkpoint_decoder

    def build(self) -> FrameDiscriminator:
        """Loads the frozen network; returns the heads on it, untrained."""
        self.features.load()
        cond_dim = 0 if self.condition is None else self.condition.dim
        return self.make_heads(self.features.channels, cond_dim)

    # ------------------------------------------------------------------ randomness

    def draw(self, batch: Batch, generator: torch.Generator, frames: int) -> dict[str, Tensor]:
        """What is random about what is looked at, each ``(B, ...)``, of videos of so many frames.

        Raises:
            FewstepError: if videos have fewer frames than are to be looked at.
        """
        size, device = len(batch["sample"]), generator.device
        if frames < self.num_frames:
            raise FewstepError(
                f"The adversary looks at {self.num_frames} frames of each video and they have "
                f"{frames}; set adversary.init_args.num_frames."
            )
        each = self.real_pictures(batch)
        numbers = NUM_UNIFORMS + self.features.num_uniforms

        def uniform(*shape: int) -> Tensor:
            return torch.rand(size, *shape, generator=generator, device=device)

        return {
            "fake_frames": uniform(frames).argsort(1)[:, : self.num_frames],
            "real_frames": uniform(frames).argsort(1)[:, : self.num_frames],
            "fake_look": uniform(self.num_frames, numbers),
            "real_look": uniform(each, numbers),
            "mix": uniform(min(each, self.num_frames)),
        }

    def real_pictures(self, batch: Batch) -> int:
        """Real pictures a video."""
        if self.real == "videos":
            return self.num_frames
        if "images" not in batch:
            raise FewstepError(
                "The adversary's real pictures are `images`, and the data have none beside their "
                "videos. Use datamodules.VideosWithImages, or set adversary.init_args.real: videos."
            )
        return len(batch["images"]["sample"]) // len(batch["sample"])

    def told_of_images(self) -> str | None:
        """Which condition of the images beside the videos the heads are told, if any."""
        if self.real != "images" or self.condition is None:
            return None
        return self.condition.name

    # ------------------------------------------------------------------ looking

    def fakes(
        self,
        video: Tensor,
        batch: Batch,
        frames: Tensor,
        uniforms: Tensor,
        codec: LatentCodec | None,
    ) -> Looks:
        """Some frames of a student's predictions, with gradient to these.

        Args:
            video: ``(B, C, F, ...)``, latents where there is a codec.
            batch: whose conditions they were made from.
            frames: ``(B, n)``, which ones.
            uniforms: see :meth:`look`.
            codec: decodes them.
        """
        pictures = frames_of(video, frames, codec, self.checkpoint_decoder)
        return self.look(pictures, uniforms, batch["cond"], batch.get("prompt"))

    @torch.no_grad()
    def reals(
        self, batch: Batch, frames: Tensor, uniforms: Tensor, codec: LatentCodec | None
    ) -> Looks:
        """Frames of the batch's videos, or the images beside them."""
        source, decoded = batch, False
        if self.real == "images":
            source = batch["images"]
            pictures = source["sample"].unflatten(0, (len(batch["sample"]), -1))
        else:
            decoded = codec is not None and batch["pixels"].shape == batch["sample"].shape
            pictures = frames_of(batch["pixels"], frames, codec if decoded else None)
        if self.round_trip and codec is not None and not decoded:  # decoding left its marks
            with torch.autocast(pictures.device.type, enabled=False):
                pictures = codec.round_trip(pictures)
        return self.look(pictures, uniforms, source["cond"], source.get("prompt"))

    def look(
        self,
        pictures: Tensor,
        uniforms: Tensor,
        cond: dict[str, Tensor],
        prompts: list[str] | None,
    ) -> Looks:
        """Augments pictures and prepares them for the frozen network.

        Args:
            pictures: ``(B, n, C, H, W)`` in [-1, 1].
            uniforms: ``(B, n, numbers)``.
            cond: conditions of the samples, ``(B, ...)``, or of each picture, ``(B * n, ...)``.
            prompts: as many captions.
        """
        size, each = pictures.shape[:2]
        numbers = uniforms.flatten(0, 1)
        augmented = self.augment(pictures.flatten(0, 1), numbers[:, :NUM_UNIFORMS])
        prepared = self.features.prepare(augmented, numbers[:, NUM_UNIFORMS:])
        if self.condition is None:
            return Looks(prepared, None, each)
        told = self.condition(cond, prompts, pictures.device)
        if len(told) == size:
            told = told.repeat_interleave(each, dim=0)
        return Looks(prepared, told, each)

    def penalty_on(
        self, discriminator: FrameDiscriminator, real: Looks, fake: Looks, mix: Tensor
    ) -> Tensor:
        """The one-centred penalty at mixtures of real and fake pictures, under the fake's caption.

        Args:
            mix: ``(B, n)``, share of the fake in each mixture.
        """
        share = mix.flatten().view(-1, 1, 1, 1)
        both = torch.lerp(real.first(mix.shape[1]), fake.first(mix.shape[1]).detach(), share)
        with torch.no_grad():
            tokens = self.features.tokens(both)
        leaves = [level.detach().requires_grad_(True) for level in tokens]
        cond = None
        if fake.cond is not None:
            cond = fake.cond.unflatten(0, (-1, fake.each))[:, : mix.shape[1]].flatten(0, 1)
        return one_centred_penalty(leaves, [discriminator.score(leaves, cond)])


def frames_of(
    video: Tensor, frames: Tensor, codec: LatentCodec | None, checkpointed: bool = False
) -> Tensor:
    """Frames ``(B, n)`` of videos, pixels or a codec's latents, as pixels ``(B, n, C, H, W)``."""
    if codec is None:
        return chosen_frames(video, frames)
    with torch.autocast(video.device.type, enabled=False):
        return codec.decode_frames(video, frames, checkpointed)


def how_told_apart(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Mean scores of both sides, and the share of them on the right side of zero."""
    return {
        "real_score": real.mean(),
        "fake_score": fake.mean(),
        "real_accuracy": (real > 0).float().mean(),
        "fake_accuracy": (fake < 0).float().mean(),
    }

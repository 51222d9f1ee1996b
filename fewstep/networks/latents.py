"""Between pixels and the latents a network sees."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of, vae_factors
from fewstep.networks.parts import load_part


@dataclass(frozen=True)
class LatentSpace:
    """From a VAE's latents to those a network sees: ``(z - shift) * scale``, by channel.

    Attributes:
        shift, scale: ``(C,)`` or ``(1,)``.
    """

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, config: Any) -> LatentSpace:
        """Reads whichever of the usual names a VAE's configuration has."""
        mean, std = config.get("latents_mean"), config.get("latents_std")
        factor = config.get("scaling_factor") or 1.0
        if mean is not None and std is not None:
            return cls(torch.as_tensor(mean), factor / torch.as_tensor(std))
        return cls(torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([factor]))

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, ...)`` as a network sees them, float32."""
        return (latents.float() - _by_channel(self.shift, latents)) * self.deviation(latents)

    def restored(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalised`, float32."""
        return latents.float() / self.deviation(latents) + _by_channel(self.shift, latents)

    def deviation(self, latents: Tensor) -> Tensor:
        """What standard deviations of ``latents`` are multiplied with."""
        return _by_channel(self.scale, latents)


def _by_channel(values: Tensor, latents: Tensor) -> Tensor:
    there = values.float().to(latents.device, non_blocking=True)
    return there.view(1, -1, *[1] * (latents.ndim - 2))


class LatentCodec:
    """A pipeline's VAE, on latents as the denoising network sees them.

    Frames are coded one by one where the VAE is one for images.

    Args:
        folder: the pipeline's.
        device: where to compute.
        dtype: in which precision to compute; VAEs that overflow in half precision stay in float32.
        tiling, slicing: save memory, by parts of a sample or by samples. Tiles change pixels a
            little where they meet.

    Attributes:
        encodes_videos: whether it is a VAE for videos.
        factors: pixels a latent in time and in space.

    Raises:
        FewstepError: if the VAE is missing or damaged, or cannot do these.
    """

    def __init__(
        self,
        folder: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        if not (folder / "vae").is_dir() and not family_of(folder).latent:
            raise FewstepError(f"'{folder}' makes pixels: it has no VAE, and nothing is encoded.")
        vae = load_part(folder, "vae", dtype).to(device)
        if vae.config.get("force_upcast"):
            vae.to(torch.float32)
        for name, wanted in (("tiling", tiling), ("slicing", slicing)):
            if wanted:
                _enable(vae, name)
        self._use(vae)

    @classmethod
    def of(cls, vae: Any) -> LatentCodec:
        """The codec of a VAE that is loaded, such as a pipeline's own.

        The VAE stays as it is; one that overflows in half precision is copied in float32.
        """
        codec = cls.__new__(cls)
        if vae.config.get("force_upcast") and vae.dtype == torch.float16:
            vae = deepcopy(vae).to(torch.float32)
        codec._use(vae)
        return codec

    def _use(self, vae: Any) -> None:
        self.vae = vae
        config = dict(vae.config)
        if isinstance(getattr(self.vae, "latents_mean", None), Tensor):  # LTX-Video's are weights
            config |= {"latents_mean": self.vae.latents_mean, "latents_std": self.vae.latents_std}
        self.space = LatentSpace.of(config)
        weight = next(w for w in self.vae.encoder.parameters() if w.ndim >= 4)
        self.encodes_videos = weight.ndim == 5
        self.factors = vae_factors({**config, "_class_name": type(self.vae).__name__})
        self._decode_time = bool(config.get("timestep_conditioning"))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.vae.device
        return device

    def to(self, device: str | torch.device) -> LatentCodec:
        """Moves the VAE."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latents.

        Args:
            pixels: ``(B, C, H, W)`` or ``(B, C, F, H, W)`` in [-1, 1].

        Returns:
            both ``(B, C, ...)``, float32; no deviation for VAEs that give a single latent.
        """
        mean, std = self._raw_distribution(pixels.to(self.device, self.vae.dtype))
        mean = self.space.normalised(mean)
        return mean, None if std is None else std.float() * self.space.deviation(mean)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents ``(B, C, ...)`` of pixels in [-1, 1], float32.

        Args:
            pixels: ``(B, C, H, W)`` or ``(B, C, F, H, W)``.
            generator: draws from the VAE's distribution, on its own device; None takes the mean.
        """
        mean, std = self.distribution(pixels)
        if generator is None or std is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + std * noise.to(mean.device)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents ``(B, n, C, h, w)`` of frames ``(B, n, 3, H, W)``, each coded as an image."""
        latents = self.encode(frames.flatten(0, 1), generator)
        if self.encodes_videos:
            latents = latents[:, :, 0]
        return latents.unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def round_trip(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames ``(B, n, 3, H, W)`` encoded and decoded, each as an image, and not clamped.

        What is real then bears the VAE's marks as :meth:`decode_frames` leaves them, and nothing
        can be told from it by them.
        """
        latents = self.encode_frames(frames, generator)
        return self.pixels(latents.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents ``(B, C, H, W)`` or ``(B, C, F, H, W)``, float32."""
        return self.pixels(latents).clamp(-1, 1)

    def decode_frames(self, latents: Tensor, frames: Tensor, checkpointed: bool = False) -> Tensor:
        """Some frames of videos as pixels ``(B, n, 3, H, W)``, with gradient to the latents.

        A VAE for images decodes these frames alone. One for videos decodes the whole clip, since a
        frame depends on those before it; that costs the memory and time of all frames.

        Pixels are not clamped, and so may be a little outside [-1, 1]: clamped ones would have no
        gradient there, and what overshoots could not be put right.

        Args:
            latents: ``(B, C, F, h, w)``.
            frames: ``(B, n)``, numbers of frames in pixels, which with a VAE for images are those
                in latents.
            checkpointed: keep only the decoder's input for the backward pass and compute the rest
                once more, ``B`` frames at a time, or a whole clip.
        """
        if self.encodes_videos:
            return chosen_frames(self.pixels(latents, checkpointed), frames)
        chosen = chosen_frames(latents, frames.to(latents.device)).transpose(1, 2)
        return self.pixels(chosen, checkpointed).transpose(1, 2)

    def pixels(self, latents: Tensor, checkpointed: bool = False) -> Tensor:
        """Pixels of latents ``(B, C, H, W)`` or ``(B, C, F, H, W)``, with gradient to these.

        float32, as the VAE gives them: not clamped, see :meth:`decode_frames`.

        Args:
            checkpointed: see :meth:`decode_frames`.
        """
        z = self.space.restored(latents.to(self.device)).to(self.vae.dtype)
        decode: Any = self._decode_part
        if checkpointed:
            decode = partial(checkpoint, decode, use_reentrant=False)
        if z.ndim == 5 and not self.encodes_videos:
            images = z.transpose(1, 2).flatten(0, 1)
            # As many images at a time as there are videos: frames do not multiply the memory.
            found = [decode(part) for part in images.split(len(z))]
            pixels = _videos(torch.cat(found), len(z))
        elif z.ndim == 4 and self.encodes_videos:
            pixels = decode(z[:, :, None])[:, :, 0]
        else:
            pixels = decode(z)
        return pixels.float()

    def _decode_part(self, z: Tensor) -> Tensor:
        # A decoder for videos may denoise a little itself; at time 0, its pipeline's, it does not.
        time = (z.new_zeros(len(z)),) if self._decode_time else ()
        pixels: Tensor = self.vae.decode(z, *time).sample
        return pixels

    def _raw_distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """As the VAE gives it."""
        if self.encodes_videos:
            clips = pixels if pixels.ndim == 5 else pixels[:, :, None]
            return _mean_and_std(self.vae.encode(clips))
        if pixels.ndim == 4:
            return _mean_and_std(self.vae.encode(pixels))
        batch = len(pixels)
        images = pixels.transpose(1, 2).flatten(0, 1)
        found = [_mean_and_std(self.vae.encode(part)) for part in images.split(batch)]
        means = _videos(torch.cat([mean for mean, _ in found]), batch)
        stds = [std for _, std in found if std is not None]
        return means, _videos(torch.cat(stds), batch) if stds else None


def _enable(vae: Any, name: str) -> None:
    try:
        getattr(vae, f"enable_{name}")()
    except (AttributeError, NotImplementedError) as error:
        raise FewstepError(
            f"An {type(vae).__name__} has no {name}; leave vae_{name} out."
        ) from error


def chosen_frames(video: Tensor, frames: Tensor) -> Tensor:
    """Frames ``(B, n, C, H, W)`` of videos ``(B, C, F, H, W)``, others in each sample.

    Args:
        frames: ``(B, n)``, their numbers.
    """
    samples = torch.arange(len(video), device=video.device)
    return video.transpose(1, 2)[samples[:, None], frames.to(video.device)]


def _mean_and_std(encoded: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(encoded, "latents"):
        return encoded.latents, None
    return encoded.latent_dist.mode(), encoded.latent_dist.std


def _videos(images: Tensor, batch: int) -> Tensor:
    """Images ``(B * F, C, H, W)`` as videos ``(B, C, F, H, W)``."""
    return images.unflatten(0, (batch, -1)).transpose(1, 2)

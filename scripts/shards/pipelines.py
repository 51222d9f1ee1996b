"""A diffusers pipeline's VAE and text encoders, without its denoising network."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.errors import FewstepError

LatentKind = Literal["sample", "mean", "moments"]
Conditions = dict[str, Tensor]
MODELS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TEXT_MODELS = MODELS[1:]


def _plain(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    text, empty = pipeline.encode_prompt(
        prompts, pipeline.vae.device, 1, do_classifier_free_guidance=guided
    )
    return {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}


def _xl(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(
        prompts, device=pipeline.vae.device, do_classifier_free_guidance=guided
    )
    return (
        {"encoder_hidden_states": text, "text_embeds": pooled},
        {"encoder_hidden_states": empty, "text_embeds": empty_pooled},
    )


def _wan(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    # The length with which the pipeline itself generates, not encode_prompt's own default.
    length = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    text, empty = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=guided,
        max_sequence_length=length,
        device=pipeline.vae.device,
    )
    return {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}


Branches = tuple[Conditions, Conditions]
TEXT: dict[str, Callable[[Any, list[str], bool], Branches]] = {
    "StableDiffusionPipeline": _plain,
    "StableDiffusionXLPipeline": _xl,
    "TextToVideoSDPipeline": _plain,
    "AnimateDiffPipeline": _plain,
    "WanPipeline": _wan,
}
"""Supported pipelines. Their functions take prompts, and whether to give the second result: what
the unconditional branch of guidance gets, by the denoising network's argument names."""


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
            return cls(torch.tensor(mean), factor / torch.tensor(std))
        return cls(torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([factor]))

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, ...)`` as a network sees them, float32."""
        return (latents.float() - _by_channel(self.shift, latents)) * self.deviation(latents)

    def deviation(self, latents: Tensor) -> Tensor:
        """What standard deviations of ``latents`` are multiplied with."""
        return _by_channel(self.scale, latents)


def _by_channel(values: Tensor, latents: Tensor) -> Tensor:
    return values.float().to(latents.device).view(1, -1, *[1] * (latents.ndim - 2))


class Encoder:
    """Encodes pixels and captions with the parts of a diffusers pipeline.

    Args:
        folder: the pipeline's, as ``save_pretrained`` writes it.
        device: where to compute.
        dtype: in which precision to compute.
        text: whether the text encoders are needed.

    Attributes:
        name: the pipeline's class.

    Raises:
        FewstepError: if the folder holds no pipeline, or none that is supported.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        text: bool = True,
    ) -> None:
        self.name = pipeline_name(folder)
        self.pipeline = _load(folder, self.name, text, dtype).to(device)
        self.vae = self.pipeline.vae
        if self.vae.config.get("force_upcast"):  # such VAEs overflow in half precision
            self.vae.to(torch.float32)
        self.device = torch.device(device)
        self.space = LatentSpace.of(self.vae.config)
        weight = next(w for w in self.vae.encoder.parameters() if w.ndim >= 4)
        self.encodes_videos = weight.ndim == 5

    # ------------------------------------------------------------------ pixels

    def check(self, size: tuple[int, int], frames: int | None) -> None:
        """Makes sure that the VAE can encode such samples whole.

        Raises:
            FewstepError: if it cannot.
        """
        pipeline = self.pipeline
        factor = getattr(pipeline, "vae_scale_factor_spatial", None) or pipeline.vae_scale_factor
        if size[0] % factor or size[1] % factor:
            raise FewstepError(f"--size must be multiples of {factor} for this VAE, not {size}.")
        every = getattr(pipeline, "vae_scale_factor_temporal", 1) if self.encodes_videos else 1
        if frames is not None and (frames - 1) % every:
            near = frames - (frames - 1) % every
            raise FewstepError(
                f"This VAE encodes 1 + {every} n frames; use --frames {near} or {near + every}."
            )

    def latents(
        self, pixels: Tensor, kind: LatentKind, noises: Callable[[Tensor], Tensor]
    ) -> Conditions:
        """Encodes pixels.

        Args:
            pixels: ``(B, C, H, W)`` or ``(B, C, F, H, W)`` in [-1, 1]. Frames are encoded one by
                one where the VAE is one for images.
            kind: what to give.
            noises: makes the noise for latents of a given tensor's shape.

        Returns:
            ``latent``, or ``mean`` and ``std``, as a network sees them: float32 ``(B, C, ...)``.
        """
        mean, std = self._distribution(pixels.to(self.device, self.vae.dtype))
        mean, spread = self.space.normalised(mean), self.space.deviation(mean)
        if kind == "mean" or (std is None and kind == "sample"):
            return {"latent": mean}
        if std is None:
            raise FewstepError(
                "This VAE gives one latent and no distribution: use --latents mean, not moments."
            )
        std = std.float() * spread
        if kind == "moments":
            return {"mean": mean, "std": std}
        return {"latent": mean + std * noises(mean)}

    def _distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation ``(B, C, ...)``; no deviation for VAEs that have none."""
        if self.encodes_videos:
            if pixels.ndim == 5:
                return _mean_and_std(self.vae.encode(pixels))
            return _mean_and_std(self.vae.encode(pixels[:, :, None]))
        if pixels.ndim == 4:
            return _mean_and_std(self.vae.encode(pixels))
        batch = len(pixels)
        images = pixels.transpose(1, 2).flatten(0, 1)
        # No more images at a time than there are videos: frames must not multiply the memory.
        found = [_mean_and_std(self.vae.encode(images_now)) for images_now in images.split(batch)]
        means = _videos(torch.cat([mean for mean, _ in found]), batch)
        stds = [std for _, std in found if std is not None]
        return means, _videos(torch.cat(stds), batch) if stds else None

    # ------------------------------------------------------------------ text

    def text(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of prompts, each ``(B, ...)``, by the denoising network's argument names."""
        return TEXT[self.name](self.pipeline, list(prompts), False)[0]

    def empty(self) -> Conditions:
        """What the pipeline gives its unconditional branch, each ``(1, ...)``.

        Mostly the embedding of the empty prompt; zeros where the pipeline is made so.
        """
        return TEXT[self.name](self.pipeline, [""], True)[1]


def _mean_and_std(encoded: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(encoded, "latents"):
        return encoded.latents, None
    return encoded.latent_dist.mode(), encoded.latent_dist.std


def _videos(images: Tensor, batch: int) -> Tensor:
    """Images ``(B * F, C, H, W)`` as videos ``(B, C, F, H, W)``."""
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


# ---------------------------------------------------------------------- folders


def pipeline_name(folder: Path) -> str:
    """The class of a pipeline's folder.

    Raises:
        FewstepError: if it is no pipeline's, or not supported.
    """
    try:
        name = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise FewstepError(
            f"'{folder}' is no folder of a diffusers pipeline: it needs a model_index.json, as "
            "save_pretrained or `hf download REPOSITORY --local-dir FOLDER` writes it."
        ) from error
    if name not in TEXT:
        raise FewstepError(f"'{folder}' is a {name}; supported are {', '.join(TEXT)}.")
    return name


def native_size(folder: Path) -> tuple[int, int] | None:
    """Height and width the pipeline was made for, if its folder tells."""
    try:
        sample = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
        blocks = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    except (OSError, ValueError, KeyError):
        return None
    factor = 2 ** (len(blocks) - 1)
    height, width = sample if isinstance(sample, list) else (sample, sample)
    return height * factor, width * factor


def weights_hash(folder: Path, text: bool) -> str:
    """A hash of all files of the parts that encode."""
    digest = hashlib.sha256()
    for part in MODELS if text else MODELS[:1]:
        for path in sorted((folder / part).glob("*")):
            if path.is_file() and not path.name.startswith("."):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{part}/{path.name} {content}\n".encode())
    return digest.hexdigest()


def _load(folder: Path, name: str, text: bool, dtype: torch.dtype) -> Any:
    import diffusers
    from diffusers.utils import is_accelerate_available
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for chatter in (diffusers_logging, transformers_logging):
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()

    listed = json.loads((folder / "model_index.json").read_text())
    kept = {"vae", "scheduler", *(TEXT_MODELS if text else ())}
    left_out = {
        part: None for part, value in listed.items() if isinstance(value, list) and part not in kept
    }
    if "requires_safety_checker" in listed:
        left_out["requires_safety_checker"] = False  # type: ignore[assignment]
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            low_cpu_mem_usage=is_accelerate_available(),  # or diffusers asks for it at length
            **left_out,
        )
    except (OSError, ValueError, ImportError) as error:
        raise FewstepError(f"Cannot load the pipeline '{folder}': {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    for part in MODELS:
        module = getattr(pipeline, part, None)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline

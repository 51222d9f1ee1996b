"""Denoisers out of diffusers pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.families import DiffusersBackbone, Family
from fewstep.networks.folders import (
    TEXT_MODELS,
    family_of,
    find_folder,
    network_folder,
    part_of,
    read_configs,
    read_json,
    sample_shape,
    weights_hash,
)
from fewstep.networks.gates import has_gates, load_gates
from fewstep.networks.latents import LatentCodec
from fewstep.networks.parts import load_part
from fewstep.networks.scheduling import read_schedule, warn_of_other_betas
from fewstep.networks.text import TextEncoding
from fewstep.remembered import REMEMBERED


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline's denoiser, frozen and in eval mode, and the way to its other parts.

    Attributes:
        denoiser: with the schedule and prediction type that the folder says.
        folder: where it was read from.
        source: where the user said it is.
        family: how its network is used.
        size: height and width of samples in pixels.
        device: where text encoders and VAE compute.
        dtype: their precision.
    """

    denoiser: Denoiser
    folder: Path
    source: str
    family: Family
    size: tuple[int, int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def sha256(self) -> str:
        """Hash of the denoising network's files."""
        return weights_hash(self.folder, network_parts(self.folder, self.family))

    @cached_property
    def text(self) -> TextEncoding:
        """The text encoders, loaded when first asked for."""
        return TextEncoding(self.folder, self.device, self.dtype)

    @cached_property
    def latents(self) -> LatentCodec:
        """The VAE, loaded when first asked for; there is none where samples are pixels."""
        return LatentCodec(self.folder, self.device, self.dtype)


def load_denoiser_of(
    where: str | Path,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    null: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    network_dtype: torch.dtype = torch.float32,
    negative_prompt: str | None = None,
    weights: bool = True,
) -> LoadedPipeline:
    """Loads the denoiser of a diffusers pipeline.

    Prediction type, schedule and the latents' scaling come from the folder; there is no other way
    to say them.

    Args:
        where: the pipeline's folder, or a name on the Hugging Face hub that is in its local cache.
        size: height and width of samples in pixels; by default what the pipeline was made for.
        frames: of videos, in pixels; by default as many as the pipeline makes.
        null: what the unconditional branch gets, each ``(1, ...)``, if it is at hand (see
            :func:`read_null`); otherwise the text encoders are loaded once to make it, and let go.
        device, dtype: of text encoders and VAE. The denoiser is on the CPU.
        network_dtype: of the denoising network's weights; half precision suits frozen ones.
        negative_prompt: what the unconditional branch gets instead of what the pipeline gives it.
        weights: whether to read the denoising network's weights; without, its folder's
            configurations are enough.

    Raises:
        FewstepError: if there is no such folder, it is of no supported pipeline, or a part of it is
            missing or damaged.
    """
    folder = find_folder(where)
    family = family_of(folder)
    configs = read_configs(folder, family, size)
    shape = sample_shape(configs, family, frames)
    options = family.options(configs)
    shapes: dict[str, list[int] | None] = dict.fromkeys(family.zero_null(configs.index))
    if family.encode is not None and (negative_prompt is not None or not shapes):
        null = dict(null or encoded_null(folder, device, dtype, negative_prompt))
        shapes = {name: list(value.shape) for name, value in null.items()}
    # Loaded after the text encoders are gone: the largest need half the memory this way.
    network = load_network(folder, family, weights).to(network_dtype)
    backbone = family.backbone(network, shape, shapes, **options)
    backbone.fill_null(null or {})
    part = network_folder(folder)
    if has_gates(part):
        load_gates(backbone, part)
    schedule, prediction_type = read_schedule(folder, backbone.num_tokens)
    warn_of_other_betas(folder, family.betas)
    denoiser = Denoiser(backbone, schedule, prediction_type).requires_grad_(False).eval()
    return LoadedPipeline(denoiser, folder, str(where), family, configs.size, device, dtype)


def encoded_null(
    folder: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    negative_prompt: str | None = None,
) -> dict[str, Tensor]:
    """What a pipeline's text encoders give the unconditional branch, each ``(1, ...)`` on the CPU.

    They are loaded for it and let go, once a process.

    Args:
        device, dtype: where and in which precision they compute.
        negative_prompt: what it gets instead of what the pipeline gives it.

    Raises:
        FewstepError: if they are missing or damaged.
    """

    def encode() -> dict[str, Tensor]:
        # Networks that start at random afterwards do so alike, whether encoders were built or not.
        with torch.random.fork_rng(devices=[]):
            found = TextEncoding(folder, device, dtype).null(negative_prompt)
        return {name: value.cpu() for name, value in found.items()}

    found = (path for part in TEXT_MODELS for path in sorted((folder / part).glob("*")))
    files = [path for path in found if path.is_file()]
    what = ("null condition", device, dtype, negative_prompt)
    null = REMEMBERED.of(what, [folder / "model_index.json", *files], encode)
    return {name: value.clone() for name, value in null.items()}


def read_null(path: str | Path) -> dict[str, Tensor]:
    """What the unconditional branch gets, each ``(1, ...)``, as ``fewstep shards encode`` wrote it.

    Raises:
        FewstepError: if the file is missing or damaged.
    """
    try:
        return {name: value[None] for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise FewstepError(
            f"Cannot read the null condition '{path}' ({error}); `fewstep shards encode` writes it "
            "as empty.safetensors beside the encoded shards."
        ) from error


def network_parts(folder: Path, family: Family) -> list[str]:
    """The parts of a folder that make the denoising network."""
    separate = _is_bare_unet(folder, family)
    part = part_of(folder, family.part)
    return [part, "motion_adapter"] if separate else [part]


def load_network(folder: Path, family: Family, weights: bool = True) -> Any:
    """The denoising network of a pipeline's folder, in float32, with or without its weights."""
    network = load_part(folder, part_of(folder, family.part), weights=weights)
    if _is_bare_unet(folder, family):
        adapter = load_part(folder, "motion_adapter", weights=weights)
        network = family.backbone.network_class.from_unet2d(network, adapter)
    expected = family.backbone.network_class
    if not isinstance(network, expected):
        raise FewstepError(
            f"'{folder / family.part}' is a {type(network).__name__}; a {family.pipeline} needs a "
            f"{expected.__name__}."
        )
    return network


def _is_bare_unet(folder: Path, family: Family) -> bool:
    """Whether an AnimateDiff folder holds the image model's U-Net, without the motion adapter."""
    if family.pipeline != "AnimateDiffPipeline":
        return False
    name = read_json(folder / family.part / "config.json").get("_class_name")
    return name == "UNet2DConditionModel"


__all__ = ["DiffusersBackbone", "LoadedPipeline", "load_denoiser_of", "read_null"]

"""What the loader must know of a model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.networks.families.base import DiffusersBackbone

Conditions = dict[str, Tensor]
Branches = tuple[Conditions, Conditions]
TextShapes = dict[str, tuple[int, ...]]
EncodeText = Callable[[Any, list[str], bool], Branches]
"""Takes a pipeline, prompts, and whether the unconditional branch is wanted too. Gives both
branches' conditionings under the backbone's argument names, each ``(B, ...)``; the second is not to
be used where it was not wanted."""


@dataclass(frozen=True)
class Configs:
    """The plain configurations in a pipeline's folder.

    Attributes:
        index: of the pipeline itself.
        network: of the denoising network.
        vae: of the VAE; empty without one.
        size: height and width of a sample in pixels.
        factors: pixels a latent, in time and in space.
    """

    index: Mapping[str, Any]
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    size: tuple[int, int]
    factors: tuple[int, int]


def _no_options(_configs: Configs) -> dict[str, Any]:
    return {}


def _as_they_are(latents: Tensor) -> Tensor:
    return latents


def _none(_index: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Family:
    """A pipeline of diffusers and how its denoising network is used.

    Attributes:
        pipeline: name of the pipeline's class.
        backbone: the family's backbone.
        part: folder of the denoising network.
        encode: encodes text; None for families without text.
        latent_channels: channels of a latent, from the network's configuration.
        latent_size: height and width of the latents the network was made for, where neither its
            configuration (``sample_size``) nor the pipeline's defaults tell.
        sized: conditionings that say an image's height and width in pixels, each ``(1, ...)``.
        patch: height and width of the network's patches in latents, where its configuration
            (``patch_size``) does not tell.
        options: further arguments of the backbone.
        zero_null: of which conditionings the unconditional branch gets zeros, so that no text
            encoder is needed to know them; from the pipeline's configuration. All or none.
        text_shapes: shapes of a sample's text, ``(L, D)`` or ``(D,)`` by the backbone's argument
            names, where configurations alone tell them; otherwise the text encoders must run.
        pipeline_latents: lays latents ``(B, C, ...)`` out as the pipeline's call takes them.
        latent: whether samples are latents of a VAE; otherwise they are pixels.
        betas: the ``beta_schedule`` its networks were trained with, where pipelines are easily
            saved with the scheduler of another; others are warned of.
    """

    pipeline: str
    backbone: type[DiffusersBackbone]
    part: str = "transformer"
    encode: EncodeText | None = None
    latent_channels: Callable[[Mapping[str, Any]], int] = lambda config: int(config["in_channels"])
    latent_size: int | None = None
    patch: int | None = None
    options: Callable[[Configs], dict[str, Any]] = _no_options
    sized: Callable[[tuple[int, int]], Conditions] | None = None
    zero_null: Callable[[Mapping[str, Any]], tuple[str, ...]] = _none
    text_shapes: Callable[[Configs], TextShapes] | None = None
    pipeline_latents: Callable[[Tensor], Tensor] = _as_they_are
    latent: bool = True
    betas: str | None = None


def encode_plain(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    """One CLIP text encoder, as Stable Diffusion has it: ``encoder_hidden_states (B, L, D)``."""
    text, empty = pipeline.encode_prompt(
        prompts, pipeline.text_encoder.device, 1, do_classifier_free_guidance=guided
    )
    return {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}


def encode_masked(pipeline: Any, prompts: list[str], guided: bool) -> Branches:
    """A T5: ``encoder_hidden_states (B, L, D)`` and ``encoder_attention_mask (B, L)``."""
    text, mask, empty, empty_mask = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=guided,
        device=pipeline.text_encoder.device,
        max_sequence_length=text_length(pipeline),
    )
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask.long()}
    if not guided:
        return given, {}
    return given, {"encoder_hidden_states": empty, "encoder_attention_mask": empty_mask.long()}


def text_length(pipeline: Any) -> int:
    """The number of tokens with which a pipeline itself generates.

    ``encode_prompt`` may have another default.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return int(parameters["max_sequence_length"].default)

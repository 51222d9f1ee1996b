"""Diffusers pipelines with tiny random networks, saved to folders."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 16


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer that knows letters and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=52,
        eos_token_id=53,
    )


def unet(cross_attention_dim: int = WIDTH, **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=4,
        attention_head_dim=4,
        **config,
    )


def scheduler(**config: Any) -> DDIMScheduler:
    """With Stable Diffusion's betas, as its pipelines have them."""
    released = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    released |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**{**released, **config})


def image_vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )


def tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def save_stable_diffusion(folder: Path, vae: Any = None, scheduling: Any = None) -> Path:
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=vae or image_vae(scaling_factor=0.5, shift_factor=0.25),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(folder / "made"),
        unet=unet(),
        scheduler=scheduling or scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_stable_diffusion_xl(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "made")
    StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        ),
        scheduler=scheduler(timestep_spacing="trailing"),
    ).save_pretrained(folder)
    return folder


def motion_adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )


def save_text_to_video(folder: Path, kind: type[Any]) -> Path:
    """A TextToVideoSDPipeline or an AnimateDiffPipeline."""
    torch.manual_seed(0)
    networks: dict[str, Any] = {"unet": unet()}
    if kind is AnimateDiffPipeline:
        networks["motion_adapter"] = motion_adapter()
    else:
        networks["unet"] = UNet3DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=WIDTH,
            norm_num_groups=4,
            attention_head_dim=4,
        )
    kind(
        vae=image_vae(scaling_factor=0.5),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(folder / "made"),
        scheduler=scheduler(beta_schedule="linear"),
        **networks,
    ).save_pretrained(folder)
    return folder


def save_text_model(folder: Path) -> CLIPTextModelWithProjection:
    """A CLIP's text model with its tokenizer, whose embeddings have 12 numbers."""
    torch.manual_seed(0)
    config = clip_config()
    config.projection_dim = 12
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    return model

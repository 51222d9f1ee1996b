"""Diffusers pipelines with tiny random transformers, saved to folders; and all of them by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    TextToVideoSDPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny_pipelines import (
    WIDTH,
    clip_config,
    clip_tokenizer,
    image_vae,
    save_stable_diffusion,
    save_stable_diffusion_xl,
    save_text_to_video,
    scheduler,
)

TINY: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
VARIANCE = {
    **TINY,
    "in_channels": 4,
    "out_channels": 8,  # as many again for a learned variance
    "sample_size": 8,
    "patch_size": 2,
    "norm_num_groups": 4,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like a T5's that knows a few words."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "moving": 4, "and": 5}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5(width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def save_wan(folder: Path) -> Path:
    torch.manual_seed(0)
    WanPipeline(
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 1.5, 0.5, 1.0],
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=8, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer=word_tokenizer(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def save_sd3(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "made")
    StableDiffusion3Pipeline(
        vae=image_vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=word_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            **TINY,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def save_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    torch.manual_seed(0)
    FluxPipeline(
        vae=image_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(folder / "made"),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
    ).save_pretrained(folder)
    return folder


def save_pixart(folder: Path) -> Path:
    torch.manual_seed(0)
    PixArtSigmaPipeline(
        vae=image_vae(scaling_factor=0.13),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=PixArtTransformer2DModel(
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
            **VARIANCE,
        ),
        scheduler=scheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder)
    return folder


def save_dit(folder: Path) -> Path:
    torch.manual_seed(0)
    DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_embeds_ada_norm=1000,
            **VARIANCE,
        ),
        vae=image_vae(scaling_factor=0.18),
        scheduler=scheduler(
            beta_schedule="linear", beta_start=0.0001, beta_end=0.02, set_alpha_to_one=True
        ),
        id2label={0: "tench, Tinca tinca"},
    ).save_pretrained(folder)
    return folder


def ltx_vae(**config: Any) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        scaling_factor=1.5,
        **config,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return vae


def save_ltx(folder: Path) -> Path:
    torch.manual_seed(0)
    LTXPipeline(
        vae=ltx_vae(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            cross_attention_dim=16,
            **TINY,
            caption_channels=WIDTH,
            qk_norm="rms_norm_across_heads",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64
        ),
    ).save_pretrained(folder)
    return folder


def loaded_by_diffusers(folder: Path) -> Any:
    """A saved pipeline, as diffusers itself loads it."""
    if not (folder / "transformer" / "config.json").exists():
        return DiffusionPipeline.from_pretrained(folder)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    if config["_class_name"] != "WanTransformer3DModel":
        return DiffusionPipeline.from_pretrained(folder)
    # diffusers reads this one with the accelerate package only.
    network = WanTransformer3DModel.from_config(config)
    network.load_state_dict(load_file(next((folder / "transformer").glob("*.safetensors"))))
    return WanPipeline.from_pretrained(folder, transformer=network.eval())


SAVES: dict[str, Callable[[Path], Path]] = {
    "sd": save_stable_diffusion,
    "sd2-v": lambda folder: save_stable_diffusion(
        folder, scheduling=scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ),
    "sdxl": save_stable_diffusion_xl,
    "sd3": save_sd3,
    "flux": save_flux,
    "pixart": save_pixart,
    "dit": save_dit,
    "modelscope": lambda folder: save_text_to_video(folder, TextToVideoSDPipeline),
    "animatediff": lambda folder: save_text_to_video(folder, AnimateDiffPipeline),
    "wan": save_wan,
    "ltx": save_ltx,
}

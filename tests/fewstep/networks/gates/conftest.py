"""Tiny networks of all families, with random weights in every place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
    WanTransformer3DModel,
)
from diffusers.models.unets.unet_motion_model import MotionAdapter
from torch import Tensor, nn

from fewstep.networks import Latte, UViT, VideoDiT

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PATCHES: dict[str, Any] = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
TIMES = torch.tensor([999.0, 250.0])


@dataclass
class Tiny:
    """A network and the arguments to call it with."""

    network: nn.Module
    given: dict[str, Any]

    def __call__(self, network: nn.Module | None = None) -> Tensor:
        """The output of this network, or of another of the kind, in its own precision."""
        network = network or self.network
        dtype = next(network.parameters()).dtype
        torch.manual_seed(1)  # DiT drops labels in train mode
        output = network(**{name: _as(value, name, dtype) for name, value in self.given.items()})
        return output if isinstance(output, Tensor) else output[0]


def _as(value: Any, name: str, dtype: torch.dtype) -> Any:
    kept = name in ("timestep", "t") or not isinstance(value, Tensor)
    return value if kept or not value.is_floating_point() else value.to(dtype)


def _image(**more: Any) -> dict[str, Any]:
    return {"timestep": TIMES, "return_dict": False, **more}


def _dit() -> Tiny:
    network = DiTTransformer2DModel(**HEADS, **PATCHES, num_embeds_ada_norm=10, norm_num_groups=4)
    return Tiny(network, _image(hidden_states=randn(2, 4, 8, 8), class_labels=torch.tensor([3, 7])))


def _pixart() -> Tiny:
    network = PixArtTransformer2DModel(
        **HEADS, **PATCHES, cross_attention_dim=16, caption_channels=16, norm_num_groups=4
    )
    sizes = {"resolution": None, "aspect_ratio": None}
    text = {"encoder_hidden_states": randn(2, 5, 16), "added_cond_kwargs": sizes}
    return Tiny(network, _image(hidden_states=randn(2, 4, 8, 8), **text))


def _sd3() -> Tiny:
    network = SD3Transformer2DModel(
        **HEADS,
        **PATCHES,
        out_channels=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    text = {"encoder_hidden_states": randn(2, 5, 16), "pooled_projections": randn(2, 12)}
    return Tiny(network, _image(hidden_states=randn(2, 4, 8, 8), **text))


def _flux() -> Tiny:
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    text = {"encoder_hidden_states": randn(2, 5, 16), "pooled_projections": randn(2, 12)}
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.arange(12.0).reshape(4, 3)}
    given = _image(hidden_states=randn(2, 4, 16), **text, **ids)
    return Tiny(network, {**given, "timestep": TIMES / 1000})


def _wan() -> Tiny:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    text = {"encoder_hidden_states": randn(2, 5, 16)}
    return Tiny(network, _image(hidden_states=randn(2, 4, 2, 4, 4), **text))


def _ltx() -> Tiny:
    network = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=16, caption_channels=16, **HEADS
    )
    text = {
        "encoder_hidden_states": randn(2, 5, 16),
        "encoder_attention_mask": torch.ones(2, 5).long(),
    }
    size = {"num_frames": 2, "height": 3, "width": 3}
    return Tiny(network, _image(hidden_states=randn(2, 18, 8), **size, **text))


def _latte() -> Tiny:
    network = LatteTransformer3DModel(
        **HEADS,
        **PATCHES,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
        norm_type="ada_norm_single",
        video_length=3,
    )
    text = {"encoder_hidden_states": randn(2, 5, 16)}
    return Tiny(network, _image(hidden_states=randn(2, 4, 3, 8, 8), **text))


def _unet() -> Tiny:
    network = UNet2DConditionModel(
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    text = {"encoder_hidden_states": randn(2, 5, 16)}
    return Tiny(network, _image(sample=randn(2, 4, 8, 8), **text))


def _unet2d() -> Tiny:
    network = UNet2DModel(
        **UNET,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Tiny(network, _image(sample=randn(2, 3, 8, 8)))


def _modelscope() -> Tiny:
    network = UNet3DConditionModel(
        **UNET,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
    )
    text = {"encoder_hidden_states": randn(2, 5, 16)}
    return Tiny(network, _image(sample=randn(2, 4, 3, 8, 8), **text))


def _animatediff() -> Tiny:
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    network = UNetMotionModel.from_unet2d(_unet().network, adapter)
    text = {"encoder_hidden_states": randn(6, 5, 16)}
    return Tiny(network, _image(sample=randn(2, 4, 3, 8, 8), **text))


def _svd() -> Tiny:
    network = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        num_attention_heads=(2, 2),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )
    given = {"encoder_hidden_states": randn(2, 1, 16), "added_time_ids": randn(2, 3)}
    return Tiny(network, _image(sample=randn(2, 3, 8, 8, 8), **given))


def _amused() -> Tiny:
    network = UVit2DModel(
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=24,
        encoder_hidden_size=16,
        vocab_size=12,
        codebook_size=8,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        block_num_heads=2,
        intermediate_size=32,
        sample_size=4,
        use_bias=True,
    )
    tokens = torch.randint(8, (2, 4, 4))
    text = {"encoder_hidden_states": randn(2, 5, 16), "pooled_text_emb": randn(2, 16)}
    return Tiny(network, {"input_ids": tokens, "micro_conds": randn(2, 6), **text})


def _video_dit() -> Tiny:
    network = VideoDiT(8, 2, 3, num_layers=2, num_heads=2, head_dim=12)
    labels = torch.tensor([3, 7])
    return Tiny(network, {"x_t": randn(2, 3, 2, 8, 8), "t": TIMES, "class_labels": labels})


def _uvit() -> Tiny:
    network = UViT(8, 3, num_layers=3, num_heads=2, head_dim=8, final_conv=True)
    labels = torch.tensor([3, 7])
    return Tiny(network, {"x_t": randn(2, 3, 8, 8), "t": TIMES, "class_labels": labels})


def _own_latte() -> Tiny:
    network = Latte(8, 3, 4, num_layers=2, num_heads=2, head_dim=8, num_classes=10)
    labels = torch.tensor([3, 7])
    return Tiny(network, {"x_t": randn(2, 4, 3, 8, 8), "t": TIMES, "class_labels": labels})


MAKERS: dict[str, Callable[[], Tiny]] = {
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "wan": _wan,
    "ltx": _ltx,
    "latte": _latte,
    "unet": _unet,
    "unet2d": _unet2d,
    "modelscope": _modelscope,
    "animatediff": _animatediff,
    "svd": _svd,
    "amused": _amused,
    "video_dit": _video_dit,
    "uvit": _uvit,
    "own_latte": _own_latte,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


@torch.no_grad()
def _randomise(network: nn.Module) -> nn.Module:
    """Random weights, also where zeros would make every block the identity."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=(parameter[0].numel()) ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def tiny() -> Callable[[str], Tiny]:
    """A network of a family by name."""

    def made(name: str) -> Tiny:
        torch.manual_seed(0)
        it = MAKERS[name]()
        _randomise(it.network)
        return it

    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``family`` is each of the families in turn."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(MAKERS))

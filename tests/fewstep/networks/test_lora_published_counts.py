"""LoRAs of whole video U-Nets are those of the released Motion Consistency Models, by their size.

The published adapters (Zhai et al. 2024, rank 64) fix both numbers: AnimateDiff's file has 434 MB.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from torch import nn

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.networks.families.animatediff import AnimateDiff
from fewstep.networks.families.modelscope import ModelScope
from fewstep.networks.lora import LoRA, adapter_layers, share_base
from fewstep.networks.lora_targets import find_targets

RANK = 64
MCM_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
WIDTHS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 64,
}
# Stable Diffusion 1.5's U-Net with guoyww/animatediff-motion-adapter-v1-5-2.
ANIMATEDIFF = {
    **WIDTHS,
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
    "down_block_types": [*(["CrossAttnDownBlockMotion"] * 3), "DownBlockMotion"],
    "up_block_types": ["UpBlockMotion", *(["CrossAttnUpBlockMotion"] * 3)],
}
# ali-vilab/text-to-video-ms-1.7b.
MODELSCOPE = {
    **WIDTHS,
    "sample_size": 32,
    "cross_attention_dim": 1024,
    "attention_head_dim": 64,
    "down_block_types": [*(["CrossAttnDownBlock3D"] * 3), "DownBlock3D"],
    "up_block_types": ["UpBlock3D", *(["CrossAttnUpBlock3D"] * 3)],
}


@functools.cache
def network(name: str) -> Any:
    with torch.device("meta"):  # shapes alone: no memory, no time
        if name == "animatediff":
            return UNetMotionModel(**ANIMATEDIFF)
        return UNet3DConditionModel(**MODELSCOPE)


def parameters(of: nn.Module, names: list[str]) -> int:
    """Of ``A`` and ``B`` on these layers: a row each for all inputs, a column for all outputs."""
    weights = [of.get_submodule(name).weight for name in names]
    return sum(RANK * (weight[0].numel() + len(weight)) for weight in weights)


@pytest.mark.parametrize(
    ("name", "modules", "adapted"),
    [("animatediff", 530, 108_335_104), ("modelscope", 482, 96_022_528)],
)
def test_as_many_layers_and_parameters_are_adapted_as_in_the_released_students(
    name: str, modules: int, adapted: int
) -> None:
    names = find_targets(network(name), MCM_TARGETS)[1]
    assert len(names) == modules
    assert parameters(network(name), names) == adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["animatediff", "modelscope"])
def test_the_adapters_that_are_made_have_that_size(name: str) -> None:
    whole = network(name)
    family = AnimateDiff if name == "animatediff" else ModelScope
    with torch.device("meta"):
        backbone = family(dict(whole.config), (4, 16, 32, 32))
    # An adapter's size is its rank's multiple, and one of rank 1 is made in no time.
    lora = LoRA(rank=1, target_modules=MCM_TARGETS)
    student = share_base(Denoiser(backbone, VPSchedule(), "epsilon"), lora).student
    names = find_targets(whole, MCM_TARGETS)[1]
    assert list(adapter_layers(student.adapter)) == names
    made = sum(parameter.numel() for parameter in student.adapter.parameters())
    assert made * RANK == parameters(whole, names)


def test_modelscope_is_adapted_so_unless_told_otherwise() -> None:
    whole = network("modelscope")
    assert find_targets(whole, None)[1] == find_targets(whole, MCM_TARGETS)[1]


def test_animatediff_is_adapted_without_the_projections_that_diffusers_cannot_read() -> None:
    whole = network("animatediff")
    usual, published = (set(find_targets(whole, t)[1]) for t in (None, MCM_TARGETS))
    assert (len(usual), parameters(whole, sorted(usual))) == (456, 100_306_944)
    assert {name.rsplit(".", 1)[-1] for name in published - usual} == {"proj_in", "proj_out"}


def test_temporal_convolutions_are_adapted_where_they_are_named_alone() -> None:
    whole = network("modelscope")
    temporal = {name for name, module in whole.named_modules() if isinstance(module, nn.Conv3d)}
    assert sum(p.numel() for n in temporal for p in whole.get_submodule(n).parameters()) > 266e6
    assert not temporal & set(find_targets(whole, MCM_TARGETS)[1])
    ends = ["conv1.2", "conv2.3", "conv3.3", "conv4.3"]
    assert set(find_targets(whole, ends)[1]) == temporal
    assert len(find_targets(whole, MCM_TARGETS + ends)[1]) == 482 + len(temporal)

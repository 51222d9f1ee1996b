"""Which layers a LoRA adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3Transformer2DModel, UNetMotionModel
from torch import nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.families.stable_diffusion import StableDiffusion
from fewstep.networks.lora_targets import find_targets, inner_network

from tiny_pipelines import motion_adapter, unet


def sd3(**config: Any) -> SD3Transformer2DModel:
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4}
    widths = {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}
    return SD3Transformer2DModel(
        sample_size=4, in_channels=4, out_channels=4, pos_embed_max_size=4, **small, **widths
    )


def names(network: nn.Module, wanted: Any = None) -> list[str]:
    return find_targets(network, wanted)[1]


def test_a_unet_is_adapted_as_lcm_and_pcm_do() -> None:
    network = unet()
    found = names(network)
    left_out = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in found
    ]
    assert left_out == ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]


def test_sd3_is_adapted_in_both_streams_alike() -> None:
    found = names(sd3())
    for layer in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        assert f"transformer_blocks.1.attn.{layer}" in found
    for layer in ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"):
        assert f"transformer_blocks.0.{layer}" in found
    assert len(found) == 12 + 9  # the last block drops the text


def test_motion_modules_are_adapted_where_diffusers_can_use_it() -> None:
    network = UNetMotionModel.from_unet2d(unet(), motion_adapter())
    found = names(network)
    assert any("motion_modules" in name and name.endswith("to_q") for name in found)
    assert not any(name.endswith(("proj_in", "proj_out")) for name in found)


def test_ends_of_names_match_whole_parts_only() -> None:
    network = sd3()
    assert len(names(network, ["to_q"])) == 2
    assert names(network, ["0.attn.to_q"]) == ["transformer_blocks.0.attn.to_q"]
    assert names(network, ["proj_out"]) == ["proj_out"]
    with pytest.raises(FewstepError, match="named 'o_q'"):
        names(network, ["o_q"])


def test_a_regular_expression_matches_whole_names() -> None:
    network = sd3()
    assert names(network, r"transformer_blocks\.1\.attn\.to_[qk]") == [
        *("transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k")
    ]
    with pytest.raises(FewstepError, match="named 'to_q'"):
        names(network, "to_q")
    with pytest.raises(FewstepError, match="is no regular expression"):
        names(network, "to_(q")


def test_each_pattern_must_match_and_the_error_names_what_is_there() -> None:
    with pytest.raises(FewstepError) as caught:
        names(unet(), ["to_q", ".to_keys"])
    message = str(caught.value)
    assert "of UNet2DConditionModel is named '.to_keys'. Did you mean 'to_k'?" in message
    assert "attn1.to_k, attn1.to_out.0, attn1.to_q" in message
    assert "conv_shortcut" in message
    assert message.count("attn1.to_q") == 1
    with pytest.raises(FewstepError, match="target_modules is empty"):
        names(unet(), [])


def test_a_network_without_usual_layers_needs_names() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(FewstepError, match="Its layers end in: 0"):
        names(network)
    assert names(network, ["0"]) == ["0"]
    with pytest.raises(FewstepError, match="named '1'"):  # peft cannot merge grouped convolutions
        names(network, ["1"])


def test_names_start_at_the_network_within_a_backbone(tmp_path: Path) -> None:
    network = unet()
    assert inner_network(StableDiffusion(network, (4, 8, 8))) is network
    dit = DiT(8, 1)
    assert inner_network(dit) is dit.transformer

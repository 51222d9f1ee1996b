"""Gates merged into weights, and gates in files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_parameters,
    gate_spec,
    is_gated,
    load_gates,
    merge_gates,
    save_gates,
)

Tinies = Callable[[str], Any]


@torch.no_grad()
def disturb(network: nn.Module, std: float = 0.1) -> None:
    for parameter in gate_parameters(network):
        parameter.add_(std * torch.randn_like(parameter))


def hooks(network: nn.Module) -> int:
    return sum(
        len(kept)
        for module in network.modules()
        for kept in (
            *(module._forward_hooks, module._forward_pre_hooks),
            *(module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs),
            module._forward_hooks_always_called,
        )
    )


def test_merged_weights_compute_the_same_under_the_old_names(family: str, tiny: Tinies) -> None:
    it = tiny(family)
    plain = copy.deepcopy(it.network)
    apply_gates(it.network, ResidualGates(alpha_shape="scalar" if "unet" in family else "channel"))
    disturb(it.network)
    gated = it()
    assert (gated - it(plain)).norm() / gated.norm() > 0.01
    merge_gates(it.network)
    assert (it() - gated).norm() / gated.norm() < 2e-6  # 41 gates in the largest
    plain.load_state_dict(it.network.state_dict())  # which is strict about names
    assert torch.equal(it(plain), it())
    assert hooks(it.network) == hooks(plain)
    assert not is_gated(it.network)
    with pytest.raises(FewstepError, match="have been merged"):
        merge_gates(it.network)


def test_a_merged_network_is_an_ordinary_folder_of_diffusers(tiny: Tinies, tmp_path: Path) -> None:
    it = tiny("dit")
    apply_gates(it.network, ResidualGates())
    disturb(it.network)
    gated = it()
    merge_gates(it.network)
    it.network.save_pretrained(tmp_path)
    read = DiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    torch.testing.assert_close(it(read), gated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "full", "level": "block"}, r"'mid_block\S+' surrounds|surrounds a whole block"),
        ({"mode": "none", "skip": True}, "'up_blocks.0.rdm_skip'.* scales a skip in front of a"),
        ({"time_conditioned": True}, "and 9 more depends on the time"),
    ],
)
def test_what_is_no_change_of_a_weight_is_not_merged(
    options: dict[str, Any], told: str, tiny: Tinies
) -> None:
    it = tiny("unet2d")
    apply_gates(it.network, ResidualGates(**options))
    disturb(it.network)
    before = it()
    with pytest.raises(FewstepError, match=told):
        merge_gates(it.network)
    assert torch.equal(it(), before)  # all gates are still there
    with torch.no_grad():
        for parameter in gate_parameters(it.network):
            parameter.zero_()
    merge_gates(it.network)  # what changes nothing can go
    assert hooks(it.network) == 0


def test_a_layer_without_bias_takes_an_alpha_and_no_beta() -> None:
    network = nn.Sequential(nn.Linear(3, 4, bias=False))
    apply_gates(network, ResidualGates(include=["0"]))
    with torch.no_grad():
        network[0].rdm_gate.beta.fill_(0.1)
    with pytest.raises(FewstepError, match=r"'0.rdm_gate' adds a beta to a layer without a bias"):
        merge_gates(network)
    with torch.no_grad():
        network[0].rdm_gate.beta.zero_()
        network[0].rdm_gate.delta.fill_(1.0)
    expected = network(torch.ones(1, 3))
    merge_gates(network)
    assert torch.equal(network(torch.ones(1, 3)), expected)
    assert list(network.state_dict()) == ["0.weight"]


def test_a_fuse_map_takes_its_skips_scale() -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"skip_linear": nn.Linear(8, 4)})
    apply_gates(network, ResidualGates(mode="none", skip=True))
    disturb(network, 0.5)
    layer, both = network["skip_linear"], torch.randn(3, 8)
    expected = layer(both)
    assert not torch.allclose(expected, layer.forward(both))
    assert merge_gates(network) == ["skip_linear.rdm_skip"]
    torch.testing.assert_close(layer(both), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet2d", {"mode": "full", "level": "block", "skip": True}),
        ("flux", {"mode": "full", "level": "block", "time_conditioned": True}),
        ("dit", {"alpha_shape": "channel", "init": "depth", "exclude": ["attn"]}),
    ],
)
def test_gates_come_back_from_their_files_to_the_bit(
    name: str, options: dict[str, Any], tiny: Tinies, tmp_path: Path
) -> None:
    it = tiny(name)
    plain = copy.deepcopy(it.network)
    apply_gates(it.network, ResidualGates(**options))
    disturb(it.network)
    save_gates(it.network, tmp_path)
    assert load_gates(plain, tmp_path) == ResidualGates(**options)
    assert torch.equal(it(plain), it())
    assert gate_spec(plain) == gate_spec(it.network)
    assert json.loads((tmp_path / "rdm_gates.json").read_text())["mode"] == gate_spec(plain).mode
    with pytest.raises(FewstepError, match="has residual gates already"):
        load_gates(plain, tmp_path)


def test_gates_of_a_backbone_fit_the_network_within_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = DiT(8, 3, num_layers=1)
    network = copy.deepcopy(backbone.transformer)
    apply_gates(backbone, ResidualGates())
    disturb(backbone)
    save_gates(backbone, tmp_path)
    load_gates(network, tmp_path)
    for name, value in backbone.transformer.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_files_that_do_not_fit_are_refused(tiny: Tinies, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="Cannot read gates"):
        load_gates(tiny("dit").network, tmp_path)
    with pytest.raises(FewstepError, match="has no residual gates"):
        save_gates(tiny("dit").network, tmp_path)
    backbone = DiT(8, 3, num_layers=2)
    apply_gates(backbone, ResidualGates())
    save_gates(backbone, tmp_path)
    network = tiny("dit").network
    with pytest.raises(FewstepError, match=r"beta' is \[96\] and here \[16\]"):
        load_gates(network, tmp_path)
    assert not is_gated(network)
    (tmp_path / "rdm_gates.json").write_text('{"mood": "full"}')
    with pytest.raises(FewstepError, match="Cannot read gates"):
        load_gates(network, tmp_path)

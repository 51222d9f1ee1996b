"""Where alpha starts, and when it would never move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT, VideoDiT
from fewstep.networks.gates import ResidualGates, apply_gates, gates_of

Tinies = Callable[[str], Any]


@pytest.mark.parametrize(
    ("name", "init", "alphas"),
    [
        ("dit", "identity", {1.0}),
        ("dit", "depth", {4**-0.5}),
        ("dit", "ode", {1 / 4}),
        ("dit", "zero", {0.0}),
        (
            "sd3",
            "ode",
            {1 / 5, 1 / 2},
        ),  # five add to the image, two to the text
    ],
)
def test_alpha_starts_by_the_number_of_branches(
    name: str, init: Any, alphas: set[float], tiny: Tinies
) -> None:
    network = tiny(name).network
    apply_gates(network, ResidualGates(init=init))
    found = {1 + gate.get_parameter("delta").item() for _, gate in gates_of(network)}
    assert sorted(found) == pytest.approx(sorted(alphas))


@pytest.mark.parametrize("chosen", [{"exclude": ["attn"]}, {"include": ["norm1.linear"]}])
def test_depth_counts_what_is_gated_whether_it_is_known_or_not(
    chosen: dict[str, Any], tiny: Tinies
) -> None:
    network = tiny("dit").network
    table = apply_gates(network, ResidualGates(init="depth", **chosen))
    for _, gate in gates_of(network):
        assert gate.get_parameter("delta").item() == pytest.approx(2**-0.5 - 1)
    assert "init depth (alpha 0.7071)." in str(table)


def test_layers_of_a_network_without_known_blocks_are_counted_too() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    table = apply_gates(network, ResidualGates(init="ode", include=[r"^\d$"]))
    assert {1 + gate.get_parameter("delta").item() for _, gate in gates_of(network)} == {0.25}
    assert "init ode (alpha 0.25)." in str(table)


def test_the_table_says_where_alpha_starts_on_either_side(tiny: Tinies) -> None:
    table = apply_gates(tiny("sd3").network, ResidualGates(init="ode"))
    assert "init ode (alpha 0.2 and 0.5)." in str(table)


def zeroed(*parts: str) -> Callable[[nn.Module], None]:
    def zero(network: nn.Module) -> None:
        for part in parts:
            for parameter in network.get_submodule(part).parameters():
                nn.init.zeros_(parameter)

    return zero


@pytest.mark.parametrize("level", ["branch", "block"])
def test_an_alpha_of_zero_on_a_block_that_starts_at_zero_is_refused(level: Any) -> None:
    spec = ResidualGates(init="zero", level=level)
    with pytest.raises(FewstepError, match=r"never train .*norm1.linear' \(adaLN-Zero\) is zero"):
        apply_gates(DiT(8, 3, num_layers=2), spec)
    with pytest.raises(FewstepError, match=r"scale_shift_table' \(adaLN-single\) is zero"):
        apply_gates(VideoDiT(8, 2, 3, num_layers=2), spec)


@pytest.mark.parametrize(
    ("name", "part", "told"),
    [
        ("flux", "single_transformer_blocks.1.norm.linear", "adaLN-Zero"),
        ("sd3", "transformer_blocks.0.norm1", "adaLN-Zero"),
        ("unet", "down_blocks.0.resnets.0.conv2", "last layer is zero"),
    ],
)
def test_so_it_is_of_other_families(name: str, part: str, told: str, tiny: Tinies) -> None:
    network = tiny(name).network
    zeroed(part)(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(FewstepError, match=told):
        apply_gates(network, ResidualGates(init="zero"))
    assert not any(True for _ in gates_of(network))


def test_and_indeed_it_would_get_no_gradient(tiny: Tinies) -> None:
    def gradients(delta: float) -> dict[str, Tensor]:
        it = tiny("dit")
        block = it.network.transformer_blocks[0]
        zeroed("norm1.linear")(block)
        apply_gates(it.network, ResidualGates())
        with torch.no_grad():
            for _, gate in gates_of(block):
                gate.get_parameter("delta").fill_(delta)
        it().square().mean().backward()
        parts = {
            "alpha": block.attn1.to_out[0].rdm_gate.delta,
            "modulation": block.norm1.linear.weight,
            "branch": block.attn1.to_out[0].weight,
            "beta": block.attn1.to_out[0].rdm_gate.beta,
        }
        return {name: parameter.grad for name, parameter in parts.items()}

    dead, alive = gradients(-1.0), gradients(0.0)
    assert not dead["alpha"].any()
    assert not dead["modulation"].any()
    assert not dead["branch"].any()
    assert alive["modulation"].any()

"""Gates on the networks of all families."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import jsonargparse
import pytest
import torch
from torch import nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT, UViT, ema_update
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_parameters,
    gates_of,
    is_gated,
    merge_gates,
)
from lightning_modules.preparation import checkpoint_activations, compile_blocks, keep_in

Tinies = Callable[[str], Any]
U_SHAPED = ("unet", "unet2d", "modelscope", "animatediff", "svd", "uvit")
UNITS = {  # at the branch and at the block level
    "dit": (4, 2),
    "pixart": (6, 2),
    "sd3": (7, 3),  # 5 and 2 branches: a second attention, and a last block without text
    "flux": (6, 5),  # 4 branches, 1 and 1; both streams but for the last block's text
    "wan": (6, 2),
    "ltx": (6, 2),
    "latte": (10, 4),  # three branches in space, two in time
    "unet": (20, 7),  # of 8 resnets 3 keep their channels; 4 transformers of 3 branches
    "unet2d": (12, 7),  # 4 attentions, 8 resnets
    "modelscope": (43, 20),  # and 5 transformers and 8 convolutions in time
    "animatediff": (41, 14),  # and 7 motion modules
    "svd": (44, 19),  # 5 transformers of 3 and 4 branches, 8 resnets in space and in time
    "amused": (12, 4),  # 2 resnets and 4 transformers, of which 2 have no feed-forward network
    "video_dit": (4, 2),
    "uvit": (6, 3),  # and a long skip
    "own_latte": (4, 2),  # a block in space, one in time
}
LARGE = ("unet", "modelscope", "animatediff", "svd")
SIZED = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in UNITS]


def gates(family: str, level: Any = "branch", **more: Any) -> ResidualGates:
    mode = "alpha_beta" if level == "branch" else "full"
    return ResidualGates(**{"mode": mode, "level": level, "skip": family in U_SHAPED, **more})


@torch.no_grad()
def disturb(network: nn.Module, std: float = 0.1) -> None:
    for parameter in gate_parameters(network):
        parameter.add_(std * torch.randn_like(parameter))


@pytest.mark.parametrize("level", ["branch", "block"])
def test_gates_of_zeros_change_no_bit_and_others_do(family: str, level: str, tiny: Tinies) -> None:
    it = tiny(family)
    plain = copy.deepcopy(it.network)
    table = apply_gates(it.network, gates(family, level, alpha_shape="channel"))
    for train in (True, False):
        assert torch.equal(it(it.network.train(train)), it(plain.train(train)))
    expected = it(plain)
    halve_alphas(it.network)
    assert (it() - expected).norm() / expected.norm() > 0.01
    units = [row for row in table.rows if "skip" not in row.name]
    assert len(units) == UNITS[family][level == "block"]
    assert table.parameters == sum(p.numel() for p in gate_parameters(it.network))


@torch.no_grad()
def halve_alphas(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if name.endswith("delta"):
            parameter.fill_(-0.5)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("level", ["branch", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SIZED)
def test_nor_do_they_in_half_precision(
    kind: str, level: str, dtype: torch.dtype, tiny: Tinies
) -> None:
    it = tiny(kind)
    half = copy.deepcopy(it.network).to(dtype)
    apply_gates(it.network, gates(kind, level, alpha_shape="channel"))
    it.network.to(dtype)
    for train in (True, False):
        expected = it(half.train(train))
        assert expected.isfinite().all()
        assert torch.equal(it(it.network.train(train)), expected)
    halve_alphas(it.network)
    assert not torch.equal(it(), expected)


def recomputing(network: Any) -> Any:
    """With recomputed activations: in diffusers' own way, or in fewstep's where it has none."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        checkpoint_activations(network)
    return network


def same_gradients(gated: nn.Module, plain: nn.Module) -> None:
    """Whether all weights but the gates' have the same gradients, to the bit."""
    found = {name: p.grad for name, p in gated.named_parameters() if "rdm_" not in name}
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    assert found.keys() == wanted.keys()
    assert sum(gradient is not None for gradient in wanted.values()) > len(wanted) / 2
    for name, gradient in wanted.items():
        mine = found[name]
        assert (mine is None) == (gradient is None), name
        assert mine is None or torch.equal(mine, cast(Any, gradient)), name


RECOMPUTED = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
    for name in UNITS
    if name not in ("modelscope", "amused")  # whose classes cannot
]


@pytest.mark.parametrize("level", ["branch", "block"])
@pytest.mark.parametrize("kind", RECOMPUTED)
def test_nor_do_they_or_any_gradient_where_activations_are_recomputed(
    kind: str, level: str, tiny: Tinies
) -> None:
    it = tiny(kind)
    plain = recomputing(copy.deepcopy(it.network)).train()
    apply_gates(it.network, gates(kind, level))
    recomputing(it.network).train()
    calls: list[int] = []
    for layer in it.network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
    output, expected = it(), it(plain)
    assert torch.equal(output, expected)
    once = len(calls)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert len(calls) > once  # or nothing was computed again
    same_gradients(it.network, plain)
    assert all(p.grad is not None for p in gate_parameters(it.network))


@pytest.mark.parametrize("level", ["branch", "block"])
def test_gates_stay_float32_in_half_precision(level: str, tiny: Tinies) -> None:
    it = tiny("unet2d")
    apply_gates(it.network, gates("unet2d", level))
    disturb(it.network)
    values = [parameter.clone() for parameter in gate_parameters(it.network)]
    for halved in (it.network.to(torch.bfloat16), it.network.half()):
        assert all(map(torch.equal, values, gate_parameters(halved)))
        assert it().dtype == next(halved.parameters()).dtype  # and promote nothing
    doubled = gate_parameters(it.network.double())
    assert {parameter.dtype for parameter in doubled} == {torch.float64}


def test_gates_stay_float32_where_layers_are_kept_in_eight_bits(tiny: Tinies) -> None:
    it = tiny("dit")
    plain = copy.deepcopy(it.network)
    apply_gates(it.network, ResidualGates())
    for network in (plain, it.network):
        network.to(torch.bfloat16)
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert {p.dtype for p in gate_parameters(it.network)} == {torch.float32}
    assert {p.dtype for p in plain.transformer_blocks.parameters()} >= {torch.float8_e4m3fn}
    assert torch.equal(it(), it(plain))


@pytest.mark.parametrize("level", ["branch", "block"])
def test_every_gate_gets_gradient(family: str, level: str, tiny: Tinies) -> None:
    it = tiny(family)
    it.network.requires_grad_(False)
    timed = family != "amused"  # which predicts tokens and is told no time
    apply_gates(it.network, gates(family, level, time_conditioned=timed))
    it().square().mean().backward()
    for name, gate in gates_of(it.network):
        for parameter in gate.parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_a_copy_a_pickle_and_an_average_have_gates_of_their_own(tiny: Tinies) -> None:
    for family, level in (("dit", "branch"), ("unet2d", "block")):
        it = tiny(family)
        apply_gates(it.network, gates(family, level))
        average = copy.deepcopy(it.network)
        again = pickle.loads(pickle.dumps(it.network))
        before = it(average)
        disturb(it.network)
        assert not torch.equal(it(), before)
        assert torch.equal(it(average), before)
        assert torch.equal(it(again), before)
        again.load_state_dict(it.network.state_dict())
        assert torch.equal(it(again), it())
        ema_update(average, it.network, 0.0)
        assert torch.equal(it(average), it())


def grads(network: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(output.square().mean(), list(network.parameters()))
    return [gradient.detach() for gradient in found]


@pytest.mark.parametrize("level", ["branch", "block"])
def test_recomputed_activations_give_the_same_output_and_gradients(
    level: str, tiny: Tinies
) -> None:
    it = tiny("video_dit")
    apply_gates(it.network, gates("video_dit", level, time_conditioned=True))
    disturb(it.network)
    expected, plain = it(), grads(it.network, it())
    checkpoint_activations(it.network)
    output = it()
    with torch.no_grad():  # at other times, before the backward pass
        it.network(**{**it.given, "t": it.given["t"] - 100})
    assert torch.equal(output, expected)
    assert all(map(torch.equal, grads(it.network, output), plain))


def test_gates_see_blocks_that_were_checkpointed_before(tiny: Tinies) -> None:
    it = tiny("video_dit")
    checkpoint_activations(it.network)
    apply_gates(it.network, gates("video_dit", "block"))
    before = it()
    disturb(it.network)
    assert not torch.equal(it(), before)


def compiled_like_plain(network: nn.Module, block: nn.Module, given: tuple[Any, ...]) -> None:
    expected = network(*given)
    wanted = grads(network, expected)
    block.compile(backend="aot_eager", fullgraph=True)
    found = network(*given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grads(network, found), wanted, atol=1e-6, rtol=1e-5)
    disturb(network)
    assert not torch.allclose(network(*given), expected, atol=1e-4)  # no value is compiled in


@pytest.mark.threads
def test_a_compiled_layer_calls_its_gate() -> None:
    network = nn.Sequential(nn.Linear(3, 4))
    apply_gates(network, ResidualGates(include=["0"]))
    disturb(network)
    compiled_like_plain(network, network, (torch.randn(5, 3),))
    expected = network(torch.ones(1, 3))
    assert merge_gates(network) == ["0.rdm_gate"]
    torch.testing.assert_close(network(torch.ones(1, 3)), expected)  # it is gated no longer


@pytest.mark.slow
@pytest.mark.threads
@pytest.mark.parametrize("level", ["branch", "block"])
def test_compiled_blocks_compute_what_others_do(level: str, tiny: Tinies) -> None:
    it = tiny("video_dit")
    apply_gates(it.network, gates("video_dit", level, time_conditioned=True))
    disturb(it.network)
    for block in it.network.blocks[1:]:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled_like_plain(it.network, it.network.blocks[0], tuple(it.given.values()))


@pytest.mark.slow
@pytest.mark.threads
@pytest.mark.parametrize("level", ["branch", "block"])
def test_whole_networks_compile_without_a_break(level: str, tiny: Tinies) -> None:
    for family in ("dit", "flux", "unet2d"):
        it = tiny(family)
        apply_gates(it.network, gates(family, level))
        disturb(it.network)
        expected = it()
        it.network.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(it(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.threads
@pytest.mark.parametrize("name", ["dit", "uvit", "unet2d"])
def test_gates_of_zeros_change_no_bit_of_a_compiled_network(name: str, tiny: Tinies) -> None:
    it = tiny(name)
    plain = copy.deepcopy(it.network)
    apply_gates(it.network, gates(name, alpha_shape="channel"))
    for network in (plain, it.network):
        network.compile(backend="aot_eager")
    for train in (True, False):
        assert torch.equal(it(it.network.train(train)), it(plain.train(train)))


def test_frozen_roles_in_bfloat16_keep_float32_gates() -> None:
    network = DiT(8, 3, num_layers=1)
    apply_gates(network, ResidualGates())
    keep_in(network, torch.bfloat16)
    assert {p.dtype for p in gate_parameters(network)} == {torch.float32}
    assert network.transformer.proj_out_1.weight.dtype == torch.bfloat16


def test_patterns_choose_among_the_units(tiny: Tinies) -> None:
    network = tiny("dit").network
    spec = ResidualGates(include=[r"attn1", r"blocks\.1\.ff"], exclude=[r"^transformer_blocks\.0"])
    names = [row.name for row in apply_gates(network, spec).rows]
    assert names == [
        "transformer_blocks.1.attn1.to_out.0.rdm_gate",
        "transformer_blocks.1.ff.net.2.rdm_gate",
    ]


def test_a_pattern_may_be_the_class_of_blocks(tiny: Tinies) -> None:
    kinds = {row.kind for row in apply_gates(tiny("unet").network, ResidualGates()).rows}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}
    spec = ResidualGates(include=["ResnetBlock2D"])
    assert {r.kind for r in apply_gates(tiny("unet").network, spec).rows} == {"ResnetBlock2D"}
    derived = apply_gates(tiny("own_latte").network, ResidualGates(include=["LatteBlock"])).rows
    assert {r.kind for r in derived} == {"BasicTransformerBlock"}
    spec = ResidualGates(exclude=["ResnetBlock2D", "attn"])
    names = [row.name for row in apply_gates(tiny("unet").network, spec).rows]
    assert len(names) == 4
    assert all(".ff." in name for name in names)


class WiderBlock(nn.Module):
    """A block that says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4)


def test_blocks_that_are_not_known_are_not_passed_over_in_silence(tiny: Tinies) -> None:
    network = tiny("dit").network
    network.extra = nn.ModuleList([WiderBlock(), WiderBlock()])
    with pytest.raises(FewstepError, match=r"not known \(2 WiderBlock\).* by gates.include"):
        apply_gates(network, ResidualGates())
    with pytest.raises(FewstepError, match=r"not known \(2 WiderBlock\).* `residual_stream`; or"):
        apply_gates(network, ResidualGates(level="block"))
    with pytest.raises(FewstepError, match=r"also 'extra.0.out', of a WiderBlock"):
        apply_gates(network, ResidualGates(include=["out"]))  # as in attn1.to_out.0
    assert not is_gated(network)
    table = apply_gates(network, ResidualGates(include=[".", r"extra\.\d\.out"]))
    names = [row.name for row in table.rows]
    assert names[-2:] == ["extra.0.out.rdm_gate", "extra.1.out.rdm_gate"]
    for level in ("branch", "block"):
        network = tiny("dit").network
        network.extra = WiderBlock()
        rows = apply_gates(network, gates("dit", level, include=["."])).rows
        assert len(rows) == UNITS["dit"][level == "block"]
    with pytest.raises(FewstepError, match=r"There are none that are known"):
        apply_gates(WiderBlock(), ResidualGates(include=["."]))


def test_a_network_may_be_called_a_block_itself(tiny: Tinies) -> None:
    class MyBlockNet(nn.Module):
        def __init__(self, blocks: nn.ModuleList) -> None:
            super().__init__()
            self.blocks, self.last = blocks, nn.Linear(2, 2)

    network = MyBlockNet(tiny("dit").network.transformer_blocks)
    assert len(apply_gates(network, ResidualGates()).rows) == 4


def test_a_pattern_may_name_layers_that_end_no_known_branch(tiny: Tinies) -> None:
    table = apply_gates(tiny("dit").network, ResidualGates(include=["proj_out_2"]))
    assert [(row.name, row.kind) for row in table.rows] == [("proj_out_2.rdm_gate", "Linear")]
    assert table.rows[0].channels == 16
    assert "proj_out_2.rdm_gate" in str(table)
    assert "1 gates with 17 parameters: mode alpha_beta at the branch level" in str(table)


def test_an_overview_has_a_line_for_gates_that_differ_in_numbers_alone(tiny: Tinies) -> None:
    network = tiny("unet").network
    table = apply_gates(network, ResidualGates(include=["ff", r"down\S+resnets"], skip=True))
    assert table.overview.splitlines() == [
        "  1 x down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.rdm_gate",
        "  2 x down_blocks.0-1.resnets.0.conv2.rdm_gate",
        "  2 x up_blocks.1.attentions.0-1.transformer_blocks.0.ff.net.2.rdm_gate",
        "  1 x mid_block.attentions.0.transformer_blocks.0.ff.net.2.rdm_gate",
        "  2 x up_blocks.0-1.rdm_skip",
        table.summary,
    ]
    network = UViT(8, 3, num_layers=12, num_heads=2, head_dim=8, long_skips=False)
    table = apply_gates(network, ResidualGates(exclude=[r"blocks\.[3-5]\.", r"blocks.7", "attn"]))
    assert table.overview.splitlines()[0] == "  8 x blocks.0-2,6,8-11.ff.net.2.rdm_gate"


def test_no_gates_at_all_are_a_baseline(tiny: Tinies) -> None:
    it = tiny("dit")
    keys = list(it.network.state_dict())
    assert apply_gates(it.network, ResidualGates(mode="none")).rows == ()
    assert list(it.network.state_dict()) == keys
    assert not is_gated(it.network)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "alpha_rho"}, "level: block"),
        ({"mode": "full"}, "level: block"),
        ({"mode": "beta", "init": "depth"}, "has no alpha"),
        ({"mode": "none", "skip": True, "time_conditioned": True}, "has neither"),
        ({"include": ["("]}, "regular expressions"),
        ({"include": ["no such"]}, "is in no name"),
        ({"exclude": ["no such"]}, "no unit that would be gated"),
        ({"exclude": ["."]}, "No residual unit of DiTTransformer2DModel is left"),
        ({"skip": True}, "no long skips"),
        ({"level": "block", "include": ["pos_embed"]}, "a PatchEmbed, whose stream is not known"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], told: str, tiny: Tinies
) -> None:
    network = tiny("dit").network
    with pytest.raises(FewstepError, match=told):
        apply_gates(network, ResidualGates(**options))
    assert not is_gated(network)


def test_what_is_gated_compiled_or_unknown_is_refused(tiny: Tinies) -> None:
    network = tiny("dit").network
    apply_gates(network, ResidualGates())
    with pytest.raises(FewstepError, match="has residual gates already"):
        apply_gates(network, ResidualGates(level="block"))
    backbone = DiT(8, 3, num_layers=1)
    compile_blocks(backbone)
    with pytest.raises(FewstepError, match="is compiled already"):
        apply_gates(backbone, ResidualGates())
    with pytest.raises(FewstepError, match="is compiled already"):
        apply_gates(torch.compile(nn.Linear(2, 2)), ResidualGates(include=["weight"]))
    with pytest.raises(FewstepError, match="let its blocks say `residual_branches`"):
        apply_gates(nn.Sequential(nn.Linear(2, 2)), ResidualGates())
    with pytest.raises(FewstepError, match="has no argument named timestep or t"):
        apply_gates(
            nn.Sequential(nn.Linear(2, 2)), ResidualGates(include=["0"], time_conditioned=True)
        )


class Attending(nn.Module):
    """A block with torch's own attention, and one more layer."""

    residual_branches = ("attention.out_proj", "last")
    residual_stream = "z"

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.last = nn.Linear(4, 4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = z + self.attention(z, z, z)[0]
        return z + self.last(z)


@pytest.mark.parametrize("known", [True, False])
def test_a_layer_that_is_read_and_never_called_is_refused(known: bool) -> None:
    network: nn.Module = nn.Sequential(Attending() if known else nn.MultiheadAttention(4, 2))
    include = None if known else ["out_proj"]
    with pytest.raises(FewstepError, match=r"out_proj'.* weights .* without calling"):
        apply_gates(network, ResidualGates(include=include))
    assert not is_gated(network)
    if known:
        apply_gates(network, ResidualGates(exclude=["out_proj"]))
        assert [name for name, _ in gates_of(network)] == ["0.last.rdm_gate"]


def test_options_come_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--gates", type=ResidualGates | None, default=None)
    given = {"mode": "full", "level": "block", "init": "depth", "exclude": ["attn2"]}
    found = parser.instantiate_classes(parser.parse_object({"gates": given})).gates
    assert found == ResidualGates(**given)
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_object({"gates": {"mode": "gamma"}})

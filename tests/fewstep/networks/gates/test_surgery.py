"""Networks that grow and lose blocks: what they compute, and that they are rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone, Denoiser, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT, Latte, UViT, VideoDiT
from fewstep.networks.families.pixart import PixArtSigma
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gate_parameters,
    gate_values,
    gates_of,
)
from fewstep.networks.gates.files import gate_tensors
from fewstep.networks.gates.streams import watched_streams
from fewstep.networks.gates.surgery import STACKS, grow, prune
from fewstep.networks.lora import LoRA, share_base
from lightning_modules.preparation import checkpoint_activations

Tinies = Callable[[str], Any]
T = torch.tensor([900.0, 100.0])
COND = {"class_labels": torch.tensor([1, 2])}


MAKERS: dict[str, Callable[..., Backbone]] = {
    "dit": partial(DiT, 8, 3),
    "video_dit": partial(VideoDiT, 8, 2, 3),
    "latte": partial(Latte, 8, 2, 3, num_classes=10),
    "chain": partial(UViT, 8, 3, long_skips=False),
    "uvit": partial(UViT, 8, 3),
}


def denoiser(layers: int = 2, kind: str = "dit") -> Denoiser:
    """With random weights in every place, and blocks that are smooth in their input."""
    torch.manual_seed(0)
    backbone = MAKERS[kind](num_layers=layers, num_heads=2, head_dim=12)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.1)
    return Denoiser(backbone, VPSchedule(), "epsilon").eval().double()


def raw(model: Denoiser) -> Tensor:
    x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.raw(x.to(next(model.parameters()).dtype), T, COND)


def blocks_of(model: Denoiser) -> list[nn.Module]:
    return list(model.backbone.get_submodule("transformer.transformer_blocks").children())


@torch.no_grad()
def disturb(model: nn.Module, std: float = 0.1) -> None:
    for parameter in gate_parameters(model):
        parameter.add_(std * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("kind", "layers"), [("dit", 2), ("video_dit", 2), ("latte", 2), ("uvit", 2), ("uvit", 3)]
)
@pytest.mark.parametrize(
    "spec",
    [
        ResidualGates(time_conditioned=True),
        ResidualGates(mode="full", level="block", alpha_shape="channel"),
    ],
    ids=["branch", "block"],
)
def test_each_doubling_halves_what_the_next_one_changes(
    spec: ResidualGates, kind: str, layers: int
) -> None:
    # Euler's method is of first order: a network of 2 n blocks is twice as near to the limit as
    # one of n, and their differences halve alike.
    model = denoiser(layers, kind)
    apply_gates(model, spec)
    disturb(model)
    outputs = [raw(model)]
    for doubling in range(1, 5):
        assert grow(model) == layers * 2**doubling
        outputs.append(raw(model))
    changes = [(b - a).norm() for a, b in pairwise(outputs)]
    assert changes[0] > 1e-3 * outputs[0].norm()
    ratios = [float(b / a) for a, b in pairwise(changes)]
    assert ratios[-2:] == pytest.approx([0.5, 0.5], abs=0.03)


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{"time_conditioned": True}, {"mode": "full", "level": "block", "alpha_shape": "channel"}],
    ids=["branch", "block"],
)
def test_new_blocks_of_zeros_change_no_bit_and_learn(
    kind: str, layers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "latte" and layers % 2:
        layers += 1  # its blocks take turns
    for dtype in (torch.float32, torch.float64):
        model = denoiser(layers, kind).to(dtype)
        apply_gates(model, ResidualGates(**options))
        disturb(model)
        before = raw(model)
        assert grow(model, "zero") == 2 * layers
        assert torch.equal(raw(model), before)
    assert torch.equal(raw(rebuilt(model, tmp_path)), before)
    x = torch.randn(2, *model.sample_shape).double()
    gradients = torch.autograd.grad(model.raw(x, T, COND).mean(), gate_parameters(model))
    assert all(gradient.any() for gradient in gradients)
    disturb(model)
    assert not torch.allclose(raw(model), before)


def test_of_each_two_blocks_the_first_keeps_its_gates_and_the_second_has_zeros() -> None:
    model = denoiser()
    apply_gates(model, ResidualGates(mode="full", level="block"))
    disturb(model)
    before = [(one.alpha, one.beta, one.rho) for one in gate_values(gate_tensors(model))]
    grow(model, "zero")
    after = [(one.alpha, one.beta, one.rho) for one in gate_values(gate_tensors(model))]
    assert after == [before[0], (0, 0, 1), before[1], (0, 0, 1)]


@pytest.mark.parametrize(
    ("zeroed", "told"),
    [
        ("transformer_blocks.1.norm1.linear", r"modulation '.*' \(adaLN-Zero\) is zero too"),
        ("transformer_blocks.0.ff.net.2", r"blocks.0.ff.net.2': its last layer is zero too"),
    ],
)
def test_new_blocks_that_could_never_learn_are_refused_and_halves_are_not(
    zeroed: str, told: str
) -> None:
    model = denoiser()
    apply_gates(model, ResidualGates())
    with torch.no_grad():
        for parameter in (
            model.backbone.get_submodule("transformer")
            .get_submodule(zeroed)
            .parameters(recurse=False)
        ):
            parameter.zero_()
    with pytest.raises(FewstepError, match=f"{told}.*--new-blocks half"):
        grow(model, "zero")
    assert len(blocks_of(model)) == 2
    assert grow(model) == 4


def test_grown_gates_halve_alpha_beta_and_the_change_of_rho() -> None:
    model = denoiser()
    apply_gates(model, ResidualGates(mode="full", level="block"))
    disturb(model)
    before = gate_values(gate_tensors(model))
    grow(model)
    after = gate_values(gate_tensors(model))
    for old, new in zip([one for one in before for _ in "12"], after, strict=True):
        then, now = (torch.tensor([one.alpha, one.beta, one.rho]) for one in (old, new))
        torch.testing.assert_close(now, then / 2 + torch.tensor([0.0, 0.0, 0.5]))


def rebuilt(model: Denoiser, folder: Path) -> Denoiser:
    torch.save({"spec": model.to_spec(), "weights": model.state_dict()}, folder / "c")
    saved = torch.load(folder / "c", weights_only=True)
    again = Denoiser.from_spec(saved["spec"]).eval().double()
    again.load_state_dict(saved["weights"])
    return again


@pytest.mark.parametrize("kind", ["dit", "video_dit", "latte", "chain"])
def test_grown_and_pruned_denoisers_are_rebuilt_and_train(kind: str, tmp_path: Path) -> None:
    model = denoiser(kind=kind)
    turn = 2 if kind == "latte" else 1
    apply_gates(model, ResidualGates())
    untouched = copy.deepcopy(model).to_spec()
    twin = copy.deepcopy(model)
    grow(model)
    assert len(model.backbone.feature_blocks) == 4
    assert torch.equal(raw(rebuilt(model, tmp_path)), raw(model))
    prune(model, turn, lambda: raw(model))
    assert len(model.backbone.feature_blocks) == 4 - turn
    assert torch.equal(raw(rebuilt(model, tmp_path)), raw(model))
    assert twin.to_spec() == untouched
    checkpoint_activations(model)
    x = torch.randn(2, *model.sample_shape).double()
    gradients = torch.autograd.grad(model.raw(x, T, COND).mean(), gate_parameters(model))
    assert all(gradient.any() for gradient in gradients)
    parameters = [*model.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize("layers", [2, 3])
def test_new_long_skips_of_a_grown_network_start_without_effect_and_it_is_rebuilt(
    layers: int, tmp_path: Path
) -> None:
    model = denoiser(layers, "uvit")
    apply_gates(model, ResidualGates(mode="alpha", skip=True))
    for _, gate in gates_of(model.backbone.blocks):
        nn.init.constant_(gate.get_parameter("delta"), -1.0)  # all that is left are the skips
    before = raw(model)
    grow(model)
    assert len(model.backbone.fuses) == layers
    torch.testing.assert_close(raw(model), before)
    assert torch.equal(raw(rebuilt(model, tmp_path)), raw(model))
    with pytest.raises(FewstepError, match="long skips join each"):
        prune(model, 1, lambda: raw(model))


def test_blocks_that_take_turns_go_together() -> None:
    model = denoiser(6, "latte")
    apply_gates(model, ResidualGates())
    blocks = list(model.backbone.blocks)
    for block, alpha in zip(blocks, (1.0, 1.0, 0.0, 0.3, 0.2, 0.0), strict=True):
        for _, gate in gates_of(block):
            nn.init.constant_(gate.get_parameter("delta"), alpha - 1)
    with pytest.raises(FewstepError, match="2 at a time"):
        prune(model, 1, lambda: raw(model))
    assert prune(model, 2, lambda: raw(model)) == [4, 5]
    assert list(model.backbone.blocks) == blocks[:4]


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "ltx", "video_dit"])
def test_networks_of_diffusers_say_their_new_depth(name: str, tiny: Tinies) -> None:
    it = tiny(name)
    apply_gates(it.network, ResidualGates())
    grow(it.network)
    prune(it.network, 1, it)
    assert it.network.config["num_layers"] == 3
    if name != "video_dit":
        again = type(it.network).from_config(it.network.config)
        apply_gates(again, ResidualGates())
        again.load_state_dict(it.network.state_dict())
        assert torch.equal(it(again.eval()), it())


def test_a_backbone_of_a_pipeline_says_its_new_depth(tiny: Tinies) -> None:
    backbone = PixArtSigma(tiny("pixart").network, (4, 8, 8))
    apply_gates(backbone, ResidualGates())
    grow(backbone)
    assert len(backbone.feature_blocks) == 4
    again = PixArtSigma(**backbone.config)
    apply_gates(again, ResidualGates())
    again.load_state_dict(backbone.state_dict())


def test_the_blocks_that_add_least_go_and_a_needed_one_stays() -> None:
    model = denoiser(layers=4)
    apply_gates(model, ResidualGates())
    blocks = blocks_of(model)
    for block, alpha in zip(blocks, (0.0, 1.0, 0.001, 0.5), strict=True):
        for _, gate in gates_of(block):
            nn.init.constant_(gate.get_parameter("delta"), alpha - 1)
    before = raw(model)
    with torch.no_grad(), watched_streams(model) as streams:
        raw(model)
    ratios = [norms.ratio for norms in streams]
    assert ratios[0] == 0 < ratios[2] < ratios[3] < ratios[1]
    assert prune(model, 1, lambda: raw(model)) == [2]
    torch.testing.assert_close(raw(model), before, rtol=0.02, atol=0.02)
    assert prune(model, 1, lambda: raw(model)) == [2]
    assert blocks_of(model) == blocks[:2]


def _sharing_a_base() -> Denoiser:
    pytest.importorskip("peft")
    return share_base(denoiser().float(), LoRA(rank=2)).student


def _gated(**options: Any) -> Denoiser:
    model = denoiser()
    apply_gates(model, ResidualGates(**options))
    return model


def _compiled() -> Denoiser:
    model = _gated()
    block = blocks_of(model)[0]
    block._compiled_call_impl = block._call_impl  # as block.compile() would, without its time
    return model


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (denoiser, "Only a gated network can grow"),
        (lambda: _gated(mode="beta"), "have no alpha that could scale"),
        (lambda: _gated(exclude=["blocks.0"]), "gate all of them"),
        (_sharing_a_base, "has LoRA adapters"),
        (_compiled, "is compiled"),
    ],
)
def test_networks_that_cannot_grow_are_refused(
    make: Callable[[], Denoiser], complaint: str
) -> None:
    with pytest.raises(FewstepError, match=complaint):
        grow(make())


@pytest.mark.parametrize("chosen", [{"include": ["blocks.1"]}, {"exclude": ["blocks.0"]}])
def test_blocks_that_gates_name_by_number_are_not_pruned(chosen: dict[str, Any]) -> None:
    model = _gated(**chosen)
    with pytest.raises(FewstepError, match="name blocks by their numbers"):
        prune(model, 1, lambda: raw(model))
    assert len(blocks_of(model)) == 2


def test_stacks_of_unlike_blocks_are_refused(family: str, tiny: Tinies) -> None:
    it = tiny(family)
    if any(cls.__name__ in STACKS for cls in type(it.network).__mro__):
        return
    for change in (grow, lambda network: prune(network, 1, it)):
        with pytest.raises(FewstepError, match="are not one stack of blocks that are all alike"):
            change(it.network)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_numbers_of_blocks_that_cannot_go_are_refused(count: int) -> None:
    model = denoiser()
    with pytest.raises(FewstepError, match=f"{count} of the 2 blocks"):
        prune(model, count, lambda: raw(model))


def test_pruning_without_a_run_is_refused() -> None:
    model, other = denoiser(), denoiser()
    with pytest.raises(FewstepError, match="must call the model that is pruned"):
        prune(model, 1, lambda: raw(other))
    assert len(model.backbone.feature_blocks) == 2

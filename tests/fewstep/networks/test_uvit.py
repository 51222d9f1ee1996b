from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone
from fewstep.errors import FewstepError
from fewstep.networks import UViT
from fewstep.networks.gates import ResidualGates, apply_gates, gate_parameters, merge_gates
from fewstep.networks.gates.streams import watched_streams
from fewstep.spec import build, describe
from lightning_modules.preparation import checkpoint_activations, compile_blocks

OPTIONS: dict[str, Any] = {"patch_size": 4, "num_layers": 5, "num_heads": 2, "head_dim": 12}


def tiny(**options: Any) -> UViT:
    torch.manual_seed(0)
    return UViT(8, 2, **{**OPTIONS, "num_classes": 3, "init_std": 0.1, **options})


def inputs(frames: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    clip = () if frames is None else (frames,)
    x_t = torch.randn(3, 2, *clip, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([999.0, 500.0, 3.0]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("final_conv", [True, False])
def test_every_output_pixel_depends_on_all_patches_time_and_class(
    frames: int | None, final_conv: bool
) -> None:
    network = tiny(num_frames=frames, time_mlp=final_conv, final_conv=final_conv).eval()
    x_t, t, labels = inputs(frames)
    output = network(x_t, t, labels)
    assert output.shape == x_t.shape
    nudged = x_t.clone()
    nudged[..., -1, -1] += 1
    for changed in [(nudged, t, labels), (x_t, t - 1.5, labels), (x_t, t, (labels + 1) % 4)]:
        difference = (network(*changed) - output).abs()
        assert (difference.flatten(1).amin(1) > 0).all()


def test_a_long_skip_joins_a_block_of_the_first_half_to_its_mirror_image() -> None:
    network, outputs, skips = tiny().eval(), [], []
    for block in network.blocks:
        block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    for fuse in network.fuses:
        fuse.register_forward_pre_hook(lambda _, args: skips.append(args))
    network(*inputs())
    assert len(skips) == 2  # of five blocks: two, one in the middle, two
    assert [s[1] is outputs[i] for s, i in zip(skips, (1, 0), strict=True)] == [True, True]
    assert [s[0] is outputs[i] for s, i in zip(skips, (2, 3), strict=True)] == [True, True]
    assert len(tiny(num_layers=4).fuses) == 2
    assert not tiny(long_skips=False).fuses


def test_without_classes_there_is_no_class_token_and_labels_are_refused() -> None:
    network, (x_t, t, labels) = tiny(num_classes=None), inputs()
    assert network(x_t, t).shape == x_t.shape
    assert network.positions.shape[1] == 4 + 1
    with pytest.raises(FewstepError, match="has no classes and the data say otherwise"):
        network(x_t, t, labels)
    with pytest.raises(FewstepError, match="needs class labels"):
        tiny()(x_t, t)


def test_it_starts_as_the_paper_says() -> None:
    network = UViT(8, 2, num_layers=2, num_heads=4, head_dim=32)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name != "embed":
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()


def test_a_scaled_start_is_that_of_gates_at_depth_which_changes_only_the_ends_of_branches() -> None:
    plain, scaled = tiny(long_skips=False), tiny(long_skips=False, scaled_start=True)
    apply_gates(plain, ResidualGates(mode="alpha", init="depth"))
    torch.testing.assert_close(plain(*inputs()), scaled(*inputs()))
    merge_gates(plain)
    torch.testing.assert_close(plain.state_dict(), scaled.state_dict())
    changed = [
        name
        for name, weight in tiny(long_skips=False).state_dict().items()
        if not torch.equal(weight, scaled.state_dict()[name])
    ]
    ends = ("attn1.to_out.0.weight", "ff.net.2.weight")
    assert changed == [f"blocks.{i}.{end}" for i in range(5) for end in ends]


def test_the_width_scaled_start_of_a_plain_chain_grows_its_stream_as_the_root_of_its_depth() -> (
    None
):
    ratios = {}
    for layers in (4, 16, 64):
        network = tiny(num_layers=layers, long_skips=False, init_std=0.14)
        with torch.no_grad(), watched_streams(network) as streams:
            network(*inputs())
        ratios[layers] = (streams[-1].stream / streams[0].stream).item()
    assert ratios[4] < ratios[16] < ratios[64]
    assert ratios[64] / ratios[16] == pytest.approx(math.sqrt(4), rel=0.35)


def test_features_are_maps_of_patches_without_time_and_class() -> None:
    tokens = torch.randn(3, 2 + 4, 24)
    feature = tiny().feature(tokens)
    assert feature.shape == (3, 24, 2, 2)
    assert torch.equal(feature[:, :, 0, 1], tokens[:, 3])
    video = tiny(num_frames=4, patch_frames=2)
    feature = video.feature(torch.randn(3, 2 + 8, 24))
    assert feature.shape == (3, 24, 2, 2, 2)
    assert video.feature_blocks == {f"blocks.{i}": 24 for i in range(5)}


@pytest.mark.parametrize("long_skips", [True, False])
def test_a_described_network_is_rebuilt_with_the_same_parameters(long_skips: bool) -> None:
    network = tiny(long_skips=long_skips)
    rebuilt: nn.Module = build(describe(network), Backbone)
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(*inputs()), network(*inputs()))
    units = {
        id(p) for name in network.shard_units for p in network.get_submodule(name).parameters()
    }
    outside = [n for n, p in network.named_parameters() if id(p) not in units]
    assert not [name for name in outside if name.startswith(("blocks", "fuses"))]


@pytest.mark.parametrize("level", ["branch", "block"])
@pytest.mark.parametrize("frames", [None, 4])
def test_gates_change_no_bit_of_recomputed_blocks_either(level: Any, frames: int | None) -> None:
    network = tiny(num_frames=frames)
    expected = network(*inputs(frames))
    wanted = torch.autograd.grad(expected.square().mean(), list(network.parameters()))
    mode = "alpha_beta" if level == "branch" else "full"
    own = list(network.parameters())
    apply_gates(network, ResidualGates(mode=mode, level=level, skip=True))
    checkpoint_activations(network)
    output = network(*inputs(frames))
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output.square().mean(), own)
    torch.testing.assert_close(found, wanted)


def test_all_gates_of_branches_and_skips_merge() -> None:
    network, names = tiny(), list(tiny().state_dict())
    table = apply_gates(network, ResidualGates(skip=True))
    assert len(table.rows) == 10 + 2
    with torch.no_grad():
        for parameter in gate_parameters(network):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = network(*inputs())
    merge_gates(network)
    torch.testing.assert_close(network(*inputs()), expected)
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_long_skips_do_not_round_a_stream_that_is_kept_in_float32(autocast: bool) -> None:
    network, seen = tiny(), []
    apply_gates(network, ResidualGates(mode="alpha", skip=True, stream_dtype="float32"))
    network = network if autocast else network.to(torch.bfloat16)
    for fuse in network.fuses:
        fuse.register_forward_hook(lambda _, args, output: seen.append((*args, output)))

    x_t, *given = inputs()

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            network(x_t.to(network.embed.weight.dtype), *given)

    run()
    assert len(seen) == 2
    for fuse, (tokens, skip, output) in zip(network.fuses, seen, strict=True):
        layer = fuse.skip_linear
        both = torch.cat([tokens, skip], dim=-1)
        wanted = nn.functional.linear(both.float(), layer.weight.float(), layer.bias.float())
        assert tokens.dtype == skip.dtype == output.dtype == torch.float32
        assert torch.equal(output, wanted)
    merge_gates(network)
    run()
    assert {output.dtype for *_, output in seen[2:]} == {torch.bfloat16}, "gates end it"


@pytest.mark.slow
@pytest.mark.threads
@pytest.mark.parametrize("gates", [None, ResidualGates(mode="full", level="block", skip=True)])
def test_compiled_blocks_compute_the_same(gates: ResidualGates | None) -> None:
    network = tiny().eval()
    if gates is not None:
        apply_gates(network, gates)
    expected = network(*inputs())
    compile_blocks(network)
    torch.testing.assert_close(network(*inputs()), expected, atol=1e-5, rtol=1e-5)

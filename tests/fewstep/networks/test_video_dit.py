from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone
from fewstep.errors import FewstepError
from fewstep.networks import VideoDiT
from fewstep.networks.patches import to_patches
from fewstep.spec import build, describe


def tiny(**options: int) -> VideoDiT:
    torch.manual_seed(0)
    given = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "head_dim": 12, **options}
    return VideoDiT(8, 4, 2, num_classes=3, **given)


def stirred(**options: int) -> VideoDiT:
    """A network whose zero-initialised layers are not zero any more, as after training."""
    network = tiny(**options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([999.0, 500.0, 3.0]), torch.tensor([0, 2, 3])


def test_an_untrained_network_outputs_zero_but_can_learn() -> None:
    network = tiny()
    output = network(*inputs())
    assert output.shape == (3, 2, 4, 8, 8)
    assert torch.equal(output, torch.zeros_like(output))
    (output - 1).square().mean().backward()
    assert network.out.weight.grad.abs().sum() > 0


def test_blocks_start_as_the_identity() -> None:
    network, seen = tiny(), []
    network.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    network(*inputs())
    assert torch.equal(*seen)


def test_every_output_pixel_depends_on_all_frames_time_and_class() -> None:
    network, (x_t, t, labels) = stirred().eval(), inputs()
    output = network(x_t, t, labels)
    nudged = x_t.clone()
    nudged[:, :, -1, -1, -1] += 1
    for changed in [(nudged, t, labels), (x_t, t - 1.5, labels), (x_t, t, (labels + 1) % 4)]:
        difference = (network(*changed) - output).abs()
        assert (difference.amax((1, 3, 4)) > 1e-7).all()


def test_positions_tell_frames_rows_and_columns_apart() -> None:
    network = tiny()
    places = network.positions.unflatten(0, network.grid)
    for axis in range(3):
        assert not torch.allclose(places.select(axis, 0), places.select(axis, 1))
    assert len(network.positions.unique(dim=0)) == len(network.positions)


def test_a_described_network_is_rebuilt_with_the_same_parameters() -> None:
    network = stirred(patch_frames=2)
    rebuilt: nn.Module = build(describe(network), Backbone)
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(*inputs()), network(*inputs()))


def test_feature_blocks_are_sub_modules_of_that_width() -> None:
    network, widths = tiny(), {}
    for name in network.feature_blocks:
        block = network.get_submodule(name)
        block.register_forward_hook(lambda *args, n=name: widths.update({n: args[-1].shape[-1]}))
    network(*inputs())
    assert network.feature_blocks == widths


@pytest.mark.parametrize("patch_frames", [1, 2])
def test_features_are_maps_of_patches(patch_frames: int) -> None:
    network, (clip, _, _) = tiny(patch_frames=patch_frames), inputs()
    tokens = to_patches(clip, network.grid, network.patch)
    features = network.feature(tokens)
    assert features.shape == (3, tokens.shape[-1], 4 // patch_frames, 2, 2)
    first = clip[0, :, -patch_frames:, :4, 4:].flatten()
    assert torch.equal(features[0, :, -1, 0, 1], first)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FewstepError, match="do not divide into patches"):
        tiny(patch_size=3)
    with pytest.raises(FewstepError, match="multiple of 6"):
        tiny(head_dim=8)

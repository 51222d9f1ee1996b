from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone
from fewstep.errors import FewstepError
from fewstep.networks import Latte
from fewstep.spec import build, describe

OPTIONS: dict[str, Any] = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "head_dim": 8}


def tiny(**options: Any) -> Latte:
    torch.manual_seed(0)
    return Latte(8, 3, 2, **{**OPTIONS, "num_classes": 3, **options})


@torch.no_grad()
def stirred(**options: Any) -> Latte:
    """A network whose zero-initialised layers are not zero any more, as after training."""
    network = tiny(**options)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([999.0, 500.0, 3.0, 250.0]), torch.tensor([0, 2, 3, 1])


def test_an_untrained_network_outputs_zero_but_can_learn() -> None:
    network, seen = tiny(), []
    network.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    output = network(*inputs())
    assert torch.equal(output, torch.zeros(4, 2, 3, 8, 8))
    assert torch.equal(*seen), "blocks start as the identity"
    (output - 1).square().mean().backward()
    assert network.out.weight.grad.abs().sum() > 0


def reached(network: Latte, block: int) -> Tensor:
    """Which tokens ``(F, N)`` of a block's output a change of frame 1's first patch reaches."""
    tokens = torch.randn(1, 3, 4, 16)
    changed = tokens.clone()
    changed[:, 1, 0] += torch.randn(16)
    about = torch.randn(1, 16)
    found = [network.blocks[block](x, about) for x in (tokens, changed)]
    return (found[0] - found[1]).abs().amax(dim=(0, 3)) > 0


def test_blocks_look_across_space_and_time_in_turn() -> None:
    network = stirred().eval()
    space, time = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    space[1], time[:, 0] = True, True
    assert torch.equal(reached(network, 0), space)
    assert torch.equal(reached(network, 1), time)


def test_each_sample_is_modulated_by_its_own_time_and_class() -> None:
    network, (x_t, t, labels) = stirred().eval(), inputs()
    output = network(x_t, t, labels)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(network(x_t[one], t[one], labels[one]), output[one])
    for changed in [(x_t, t - 1.5, labels), (x_t, t, (labels + 1) % 4)]:
        assert ((network(*changed) - output).abs().flatten(1).amin(1) > 0).all()


def test_positions_tell_frames_and_places_apart() -> None:
    network = stirred(num_classes=None).eval()
    still = torch.randn(1, 2, 1, 1, 1).expand(1, 2, 3, 8, 8)
    output = network(still, torch.tensor([500.0]))
    assert not torch.allclose(output[:, :, 0], output[:, :, 1])
    assert not torch.allclose(output[..., :4, :4], output[..., :4, 4:])


def test_a_described_network_is_rebuilt_with_the_same_parameters() -> None:
    for network, given in ((stirred(), inputs()), (stirred(num_classes=None), inputs()[:2])):
        rebuilt: nn.Module = build(describe(network), Backbone)
        rebuilt.load_state_dict(network.state_dict())
        assert torch.equal(rebuilt(*given), network(*given))


def test_it_has_the_parameters_of_the_published_xl() -> None:
    with torch.device("meta"):
        network = Latte(32, 16, 4, num_layers=28, num_heads=16, head_dim=72, num_classes=101)
    # 28 blocks of 4 D^2 + 8 D^2 + 6 D^2 weights and 4 D + 5 D + 6 D biases, D = 1152.
    blocks = sum(p.numel() for p in network.blocks.parameters())
    assert blocks == 28 * (18 * 1152**2 + 15 * 1152)


def test_features_are_maps_of_patches() -> None:
    feature = tiny().feature(torch.arange(3 * 4 * 16.0).view(1, 3, 4, 16))
    assert feature.shape == (1, 16, 3, 2, 2)
    assert feature[0, 5, 2, 1, 0] == (2 * 4 + 2) * 16 + 5


def test_labels_without_classes_and_classes_without_labels_are_refused() -> None:
    x_t, t, labels = inputs()
    with pytest.raises(FewstepError, match="This Latte has no classes and the data say otherwise"):
        tiny(num_classes=None)(x_t, t, labels)
    with pytest.raises(FewstepError, match="This Latte needs class labels"):
        tiny()(x_t, t)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FewstepError, match="do not divide into patches"):
        tiny(patch_size=3)
    with pytest.raises(FewstepError, match="multiple of 4"):
        tiny(num_heads=1, head_dim=6)

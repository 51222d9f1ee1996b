from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import Backbone, Denoiser, VPSchedule
from fewstep.networks import DiT
from fewstep.spec import build, describe


def tiny() -> DiT:
    torch.manual_seed(0)
    return DiT(sample_size=8, channels=2, num_layers=2, num_heads=2, head_dim=8, num_classes=3)


def stirred() -> DiT:
    """A network whose zero-initialised layers are not zero any more, as after training."""
    network = tiny()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([999.0, 500.0, 3.0]), torch.tensor([0, 2, 3])


def test_an_untrained_network_outputs_zero_but_can_learn() -> None:
    network = tiny()
    output = network(*inputs())
    assert output.shape == (3, 2, 8, 8)
    assert torch.equal(output, torch.zeros_like(output))
    (output - 1).square().mean().backward()
    gradient = network.transformer.proj_out_2.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_blocks_start_as_the_identity() -> None:
    network, seen = tiny(), []
    blocks = network.transformer.transformer_blocks
    hook = blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    network(*inputs())
    hook.remove()
    assert torch.equal(seen[0], seen[1])


def test_labels_are_never_dropped_in_training() -> None:
    network = stirred().train()
    x_t, t, _ = (value[:1].expand(64, *value.shape[1:]) for value in inputs())
    labels = torch.zeros(64, dtype=torch.long)
    first = network(x_t, t, labels)
    # diffusers would replace a tenth of 64 equal rows by the null label, others at each call.
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=1e-4, atol=1e-5)
    assert torch.equal(network(x_t, t, labels), first)
    assert torch.equal(network.eval()(x_t, t, labels), first)


def test_the_output_depends_on_sample_time_and_class() -> None:
    network, (x_t, t, labels) = stirred(), inputs()
    output = network(x_t, t, labels)
    for changed in [(x_t + 0.1, t, labels), (x_t, t - 1.5, labels), (x_t, t, (labels + 1) % 4)]:
        assert ((network(*changed) - output).abs().amax((1, 2, 3)) > 1e-6).all()


def test_the_null_label_follows_the_last_class() -> None:
    null = tiny().null_cond({"class_labels": torch.tensor([0, 1, 2])})
    assert null["class_labels"].tolist() == [3, 3, 3]
    with pytest.raises(IndexError):
        tiny()(*inputs()[:2], torch.full((3,), 4))


def test_guidance_runs_through_the_null_label() -> None:
    denoiser = Denoiser(stirred().eval(), VPSchedule(), "epsilon")
    x_t, t, _ = inputs()
    cond = {"class_labels": torch.tensor([0, 1, 2])}
    conditional = denoiser(x_t, t, cond).eps
    unconditional = denoiser(x_t, t, {"class_labels": torch.full((3,), 3)}).eps
    expected = unconditional + 4 * (conditional - unconditional)
    guided = denoiser.guided(x_t, t, cond, 4.0).eps
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)
    assert (guided - conditional).abs().max() > 0.01


def test_feature_blocks_are_sub_modules_of_that_width() -> None:
    network, widths = tiny(), {}
    for name in network.feature_blocks:
        block = network.get_submodule(name)
        block.register_forward_hook(lambda *args, n=name: widths.update({n: args[-1].shape[-1]}))
    network(*inputs())
    assert network.feature_blocks == widths
    assert len(widths) == 2


def test_a_described_network_is_rebuilt_with_the_same_parameters() -> None:
    network = DiT(sample_size=6, channels=1, patch_size=3, num_layers=1, num_heads=1, head_dim=16)
    rebuilt: nn.Module = build(describe(network), Backbone)
    rebuilt.load_state_dict(network.state_dict())
    assert rebuilt.sample_shape == (1, 6, 6)

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance import EmbeddingDistance, Energy, MapDistance, PictureNetwork, Reward

from metric_cases import noise


def parser() -> nn.Module:
    torch.manual_seed(0)
    return PictureNetwork(nn.Conv2d(3, 5, 3, padding=1), size=(16, 16))


def face() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6)).eval()


FACE = {"rows": (2, 14), "columns": (4, 12), "side": 4}
CASES: list[Any] = [
    MapDistance(parser()),
    EmbeddingDistance(face(), **FACE),  # type: ignore[arg-type]
    EmbeddingDistance(face(), **FACE, form="cosine"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("energy", CASES)
def test_a_loss_is_zero_where_it_should_be_and_depends_on_no_batch_mate(energy: Any) -> None:
    pixels, target = noise(3, 3, 16, 16), energy.encode_images(noise(3, 3, 16, 16, seed=1))
    loss = energy(pixels, target)
    assert loss.shape == (3,)
    alone = torch.cat([energy(pixels[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss, alone)
    assert float(loss.detach().min()) > 0.01
    x = pixels.clone().requires_grad_()
    there = energy(x, energy.encode_images(pixels))
    torch.testing.assert_close(there, torch.zeros(3), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(there.sum(), x)
    assert bool(gradient.isfinite().all())


def test_maps_are_compared_by_their_euclidean_distance() -> None:
    energy = MapDistance(parser())
    pixels = noise(2, 3, 16, 16)
    maps = energy.encode_images(pixels)
    assert maps.shape == (2, 5, 16, 16)
    torch.testing.assert_close(energy(pixels, maps + 0.5), torch.full((2,), 0.5 * (5 * 256) ** 0.5))
    with pytest.raises(FewstepError, match="encode_images"):
        energy(pixels, maps[:, :1])


def test_a_face_is_cropped_and_averaged_over_areas() -> None:
    energy = EmbeddingDistance(nn.Identity().eval(), (2, 14), (4, 12), side=4)
    pixels = noise(2, 3, 16, 16).requires_grad_()
    expected = torch.nn.functional.adaptive_avg_pool2d(pixels[..., 2:14, 4:12], 4)
    torch.testing.assert_close(energy.output(pixels), expected.flatten(1))
    (gradient,) = torch.autograd.grad(energy(pixels, torch.zeros(2, 48)).sum(), pixels)
    assert bool((gradient[..., 2:14, 4:12] != 0).all())
    assert not gradient[..., :2, :].any()
    with pytest.raises(FewstepError, match="pictures are 8 x 8"):
        energy.output(noise(1, 3, 8, 8))


class Brightness(nn.Module):
    def forward(self, pixels: Tensor, wanted: Tensor | None = None) -> Tensor:
        mean = pixels.mean((1, 2, 3))
        return mean if wanted is None else -(mean - wanted).square()[:, None]


def test_a_reward_is_made_large_up_to_its_goal() -> None:
    network = Brightness().eval()
    pixels = torch.stack([torch.full((3, 4, 4), v) for v in (-0.5, 0.2, 0.9)]).requires_grad_()
    reward = torch.tensor([-0.5, 0.2, 0.9])
    torch.testing.assert_close(Reward(network)(pixels, None), -reward)
    hinge = Reward(network, goal=0.5)(pixels, None)
    torch.testing.assert_close(hinge, torch.tensor([1.0, 0.3, 0.0]))
    (gradient,) = torch.autograd.grad(hinge.sum(), pixels)
    assert not gradient[2].any()
    told = Reward(network)(pixels, torch.tensor([0.0, 0.2, 0.0]))
    torch.testing.assert_close(told, torch.tensor([0.25, 0.0, 0.81]), rtol=0, atol=1e-6)
    bounds = Reward(network), Reward(network, minimum=-1.0), Reward(network, goal=0.5)
    assert [energy.minimum for energy in bounds] == [None, -1.0, 0.0]
    with pytest.raises(FewstepError, match="minimum at 0"):
        Reward(network, goal=0.5, minimum=-1.0)


def test_networks_in_training_mode_are_refused() -> None:
    energies: list[Energy] = [
        MapDistance(nn.Conv2d(3, 5, 1)),
        EmbeddingDistance(nn.Identity()),
        Reward(Brightness()),
    ]
    for energy in energies:
        with pytest.raises(FewstepError, match=r"network\.eval\(\)"):
            energy(noise(1, 3, 4, 4), torch.zeros(1))

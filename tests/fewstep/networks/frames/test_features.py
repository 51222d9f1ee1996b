from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model

from fewstep.errors import FewstepError
from fewstep.networks.frames import ConvolutionFeatures, DINOv2Features, FrozenFeatures
from scripts.plan.roles import parameters_on_meta

SIZE = 56  # four by four patches


def save_dino(folder: Path) -> Path:
    """A DINOv2 of 12 features and 4 blocks whose positions are of 5 by 5 patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(
                hidden_size=12,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=70,
                patch_size=14,
            )
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def dino(folder: Path, **options: Any) -> DINOv2Features:
    found = DINOv2Features(str(folder), **{"layers": [0, 2, 3], "size": SIZE, **options})
    found.load()
    return found


@pytest.fixture(scope="module")
def features(folder: Path) -> DINOv2Features:
    return dino(folder)


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---------------------------------------------------------------------- DINOv2


def test_tokens_are_transformers_hidden_states_normalised(
    folder: Path, features: DINOv2Features
) -> None:
    images = pictures(2, 3, SIZE, SIZE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    network = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = network(pixel_values=pixels, output_hidden_states=True).hidden_states
        expected = [network.layernorm(hidden[layer + 1])[:, 1:] for layer in (0, 2, 3)]
        whole = network(pixel_values=pixels).last_hidden_state[:, 1:]
    found = features(images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], whole)
    assert [tuple(level.shape) for level in found] == [(2, 16, 12)] * 3


def test_levels_come_in_the_order_asked_for(folder: Path, features: DINOv2Features) -> None:
    images = pictures(1, 3, SIZE, SIZE)
    turned = dino(folder, layers=[3, 0])(images)
    assert torch.equal(turned[0], features(images)[2])
    assert torch.equal(turned[1], features(images)[0])


def test_channels_are_known_before_the_weights_are_read(folder: Path) -> None:
    found = DINOv2Features(str(folder), layers=[1, 2])
    assert found.channels == [12, 12]
    assert list(found.parameters()) == []
    found.load()
    network = found.network
    found.load()
    assert found.network is network


def test_gradient_reaches_the_images_and_not_the_weights(features: DINOv2Features) -> None:
    images = pictures(2, 3, 80, 70).requires_grad_()
    uniforms = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3]])
    torch.cat(features(images, uniforms), dim=1).sum().backward()
    assert images.grad is not None
    cropped, whole = images.grad.abs().sum(1)
    assert (whole > 0).all()
    # Of 25 and 15 places of the window the numbers choose the 5th and the 4th.
    assert (cropped[5 : 5 + SIZE, 4 : 4 + SIZE] > 0).all()
    assert cropped.count_nonzero() == SIZE * SIZE
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


def test_each_image_tosses_its_own_coin(features: DINOv2Features) -> None:
    images = pictures(2, 3, 80, 70)
    uniforms = torch.tensor([[0.49, 0.2, 0.3], [0.51, 0.2, 0.3]])
    seen = features.prepare(images, uniforms)
    resized = features.prepare(F.interpolate(images, (SIZE, SIZE), mode="area"))
    window = features.prepare(images[..., 5 : 5 + SIZE, 4 : 4 + SIZE])
    torch.testing.assert_close(seen[0], window[0])
    torch.testing.assert_close(seen[1], resized[1])
    torch.testing.assert_close(features.prepare(images), resized)
    for number in (0, 1):
        alone = features.prepare(images[number : number + 1], uniforms[number : number + 1])
        assert torch.equal(alone[0], seen[number])


@pytest.mark.parametrize("shape", [(40, 40), (40, 80), (SIZE, SIZE)])
def test_images_too_small_for_a_window_are_never_cropped(
    shape: tuple[int, int], features: DINOv2Features
) -> None:
    images = pictures(2, 3, *shape)
    seen = features.prepare(images, torch.tensor([[0.0, 0.2, 0.3], [0.1, 0.9, 0.3]]))
    assert torch.equal(seen, features.prepare(images))


def test_the_share_of_crops_is_chosen(folder: Path) -> None:
    images, uniforms = pictures(1, 3, 80, 80), torch.tensor([[0.99, 0.2, 0.3]])
    never = dino(folder, crop_share=0.0).prepare(images, torch.zeros(1, 3))
    assert torch.equal(never, dino(folder).prepare(images))
    assert not torch.equal(dino(folder, crop_share=1.0).prepare(images, uniforms), never)
    with pytest.raises(FewstepError, match=r"crop_share.*not 2"):
        DINOv2Features(crop_share=2)


def test_grey_images_are_seen_in_three_channels(features: DINOv2Features) -> None:
    images = pictures(1, 1, SIZE, SIZE)
    assert torch.equal(features.prepare(images), features.prepare(images.repeat(1, 3, 1, 1)))
    with pytest.raises(FewstepError, match=r"4 channels.*takes 3.*not decoded"):
        features.prepare(pictures(1, 4, SIZE, SIZE))


def test_a_plan_needs_no_weights_in_memory(folder: Path) -> None:
    with parameters_on_meta():
        found = dino(folder)
    assert all(parameter.is_meta for parameter in found.parameters())
    passing = copy.deepcopy(found.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        passing.to_empty(device="cpu")
        tokens = passing(torch.rand(2, 3, 80, 80), torch.rand(2, 3))
    assert [tuple(level.shape) for level in tokens] == [(2, 16, 12)] * 3


def test_the_record_tells_networks_apart(folder: Path, tmp_path: Path) -> None:
    found = DINOv2Features(str(folder), layers=[0]).origin()
    assert found["source"] == str(folder)
    assert len(found["sha256"]) == 64
    save_dino(tmp_path)
    assert DINOv2Features(str(tmp_path), layers=[0]).origin()["sha256"] == found["sha256"]
    weights = load_file(tmp_path / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert DINOv2Features(str(tmp_path), layers=[0]).origin()["sha256"] != found["sha256"]


def test_a_network_that_cannot_be_used_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"no network at 'nobody/nothing'.*hf download"):
        DINOv2Features("nobody/nothing").load()
    with pytest.raises(FewstepError, match=r"no config\.json"):
        DINOv2Features(str(tmp_path)).load()
    with pytest.raises(FewstepError, match=r"blocks 0 to 3; layers: \[2, 5, 8, 11\]"):
        assert DINOv2Features(str(folder)).channels
    with pytest.raises(FewstepError, match="patches of 14, which do not tile 60"):
        DINOv2Features(str(folder), layers=[0], size=60).load()
    save_dino(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FewstepError, match=r"lacks 1 weights.*'layernorm\.bias'"):
        dino(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(FewstepError, match=r"Cannot read .*download it again"):
        dino(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(FewstepError, match=r"type 'vit'; needed is 'dinov2'"):
        dino(tmp_path)


def test_without_transformers_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=r"fewstep\[transformers\]"):
        DINOv2Features(str(folder)).load()


# ---------------------------------------------------------------------- random convolutions


def test_random_weights_are_those_of_their_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = ConvolutionFeatures()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    images = pictures(2, 3, 32, 32)
    assert all(map(torch.equal, first(images), ConvolutionFeatures()(images)))
    assert not torch.equal(first(images)[0], ConvolutionFeatures(seed=1)(images)[0])
    # On every machine these.
    weights = next(first.parameters())
    assert weights.flatten()[:3].tolist() == PINNED


PINNED = [0.410079687833786, 0.08286188542842865, 0.429308146238327]


def test_levels_get_coarser() -> None:
    features = ConvolutionFeatures(widths=[8, 16])
    found = features(pictures(2, 3, 16, 24))
    assert [tuple(level.shape) for level in found] == [(2, 8 * 12, 8), (2, 4 * 6, 16)]
    assert features.channels == [8, 16]
    assert [level.shape[1] for level in ConvolutionFeatures()(pictures(1, 1, 8, 8))] == [16, 4, 1]


def test_tokens_keep_the_size_of_pixels() -> None:
    for level in ConvolutionFeatures(widths=[64, 128, 256])(pictures(4, 3, 64, 64)):
        assert 0.3 < float(level.std()) < 1.5


def test_blurred_images_look_different() -> None:
    features, images = ConvolutionFeatures(), pictures(4, 3, 32, 32)
    blurred = F.avg_pool2d(images, 3, 1, 1)
    for sharp, soft in zip(features(images), features(blurred), strict=True):
        assert (sharp - soft).norm() > 0.3 * sharp.norm()


@pytest.mark.parametrize("kind", ["dino", "convolutions"])
def test_an_images_tokens_depend_on_it_alone(kind: str, features: DINOv2Features) -> None:
    seeing: FrozenFeatures = features if kind == "dino" else ConvolutionFeatures()
    images = pictures(3, 3, SIZE, SIZE)
    for whole, alone in zip(seeing(images), seeing(images[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-4)


def test_the_network_stays_frozen_within_a_module_that_trains(features: DINOv2Features) -> None:
    parent = nn.ModuleList([features, ConvolutionFeatures()]).train()
    assert not any(module.training for child in parent for module in child.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def test_convolutions_take_images_of_their_channels() -> None:
    features = ConvolutionFeatures(in_channels=4)
    assert len(features(pictures(1, 4, 8, 8))) == 3
    with pytest.raises(FewstepError, match="3 channels"):
        features(pictures(1, 3, 8, 8))
    with pytest.raises(FewstepError, match="at least one level"):
        ConvolutionFeatures(widths=[])

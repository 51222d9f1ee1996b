from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from fewstep.errors import FewstepError
from fewstep.metrics import DINOv2Features, FDDINOv2, FrechetDistance, Samples
from fewstep.metrics.dino import normalised, place_positions

from metric_cases import batches, measured, measured_by_ranks, noise, random_weights

CPU = torch.device("cpu")


def save_dino(folder: Path, side: int = 70, **options: Any) -> Path:
    """A DINOv2 of 12 features whose positions are of ``side`` by ``side`` pixels."""
    config = Dinov2Config(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=14,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        model = Dinov2Model(config)
    random_weights(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def features(folder: Path) -> DINOv2Features:
    return loaded(folder)


def loaded(folder: Path, **options: Any) -> DINOv2Features:
    found = DINOv2Features(str(folder), **options)
    found.prepare()
    found.load(CPU)
    return found


def see(features: DINOv2Features, pixels: Tensor) -> Tensor:
    return features(Samples(pixels, torch.arange(len(pixels))))["features"]


def test_features_are_the_class_token_of_the_normalised_picture(tmp_path: Path) -> None:
    folder = save_dino(tmp_path, side=224)  # positions that fit: transformers as it is
    images = torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8)
    pixels = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder)(pixel_values=pixels).pooler_output
    found = see(loaded(folder), images.float() / 127.5 - 1)
    torch.testing.assert_close(found, expected)
    assert float(found.std(0).mean()) > 1e-3


def test_the_resize_is_pillows_but_for_its_rounding() -> None:
    coarse = 255 * torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(coarse, (300, 260), mode="bilinear").to(torch.uint8)
    pillow = Image.fromarray(image[0].movedim(0, -1).numpy()).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    ours = (normalised(image)[0] * std + mean) * 255
    theirs = torch.from_numpy(np.array(pillow)).movedim(-1, 0).float()
    assert float((ours.clamp(0, 255) - theirs).abs().max()) < 1.1


def _cubic(place: float) -> float:
    """A line's value at a place, by Keys' cubic convolution with PyTorch's a = -3/4."""

    def weight(x: float) -> float:
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        return near if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    around = range(int(place) - 1, int(place) + 3)
    return sum(weight(abs(place - j)) * j for j in around)


def test_positions_are_placed_as_the_published_code_places_them() -> None:
    # A grid that rises by one from patch to patch shows which places are read.
    rising = torch.arange(37.0).expand(37, 37)
    positions = torch.cat([torch.tensor([-5.0]), rising.flatten()]).view(1, -1, 1)
    placed = place_positions(positions, 16)
    assert placed.shape == (1, 257, 1)
    assert float(placed[0, 0, 0]) == -5
    grid = placed[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(grid[7], grid[0])
    read = [_cubic((place + 0.5) * 37 / 16.1 - 0.5) for place in range(1, 15)]
    torch.testing.assert_close(grid[0, 1:15], torch.tensor(read))
    whole = positions[:, : 1 + 36]
    assert place_positions(whole, 6) is whole


def test_a_video_has_the_features_of_its_frames(features: DINOv2Features) -> None:
    video = noise(2, 3, 4, 20, 20)
    found = see(features, video)
    assert found.shape == (2, 4, 12)
    torch.testing.assert_close(found[1], see(features, video[1].movedim(0, 1)))


def test_batches_and_low_precision_around_change_nothing(
    features: DINOv2Features, folder: Path
) -> None:
    images = noise(5, 3, 20, 20)
    whole = see(features, images)
    torch.testing.assert_close(see(loaded(folder, batch_size=2), images), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(see(features, images), whole)


def test_ranks_together_say_what_one_process_says(features: DINOv2Features) -> None:
    metric = FDDINOv2(features)
    generated, real = noise(20, 1, 16, 16), 0.5 * noise(24, 1, 16, 16, seed=1)
    whole = measured(metric, batches(generated), batches(real))
    assert whole["fd_dinov2"] > 1e-3
    for found in measured_by_ranks(metric, batches(generated, 5), batches(real)):
        assert found == {"fd_dinov2": pytest.approx(whole["fd_dinov2"], rel=1e-6)}
    same = measured(metric, batches(real, order=list(range(24))[::-1]), batches(real))
    assert same["fd_dinov2"] == pytest.approx(0, abs=1e-6)


def test_frames_are_measured_by_the_general_distance_only(features: DINOv2Features) -> None:
    video = batches(noise(6, 3, 4, 16, 16))
    with pytest.raises(FewstepError, match="of their frames"):
        measured(FDDINOv2(features), video, video)
    assert list(measured(FrechetDistance(features), video, video)) == ["frechet_dinov2"]


def test_a_model_that_is_nowhere_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FewstepError, match=r"facebook/dinov2-large.*hf download"):
        FDDINOv2().features.prepare()


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "vit"])
def test_another_kind_of_model_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(FewstepError, match=f"'{kind}', not 'dinov2'"):
        DINOv2Features(str(tmp_path)).prepare()


def test_a_damaged_folder_is_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FewstepError, match="cannot be read"):
        DINOv2Features(str(tmp_path)).load(CPU)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FewstepError, match=r"config\.json"):
        DINOv2Features(str(tmp_path)).prepare()


def test_patches_that_do_not_tile_the_image_are_refused(tmp_path: Path) -> None:
    config = save_dino(tmp_path) / "config.json"
    DINOv2Features(str(tmp_path)).load(CPU)
    model = Dinov2Model(
        Dinov2Config(**{**json.loads(config.read_text()), "patch_size": 15, "image_size": 60})
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(FewstepError, match="do not tile 224"):
        DINOv2Features(str(tmp_path)).load(CPU)


def test_the_protocol_says_what_the_features_depend_on(features: DINOv2Features) -> None:
    protocol = FDDINOv2(features).protocol()
    assert protocol["metric"] == "fd_dinov2"
    assert len(protocol["features"]["weights_sha256"]) == 16
    assert "bicubic" in protocol["features"]["resize"]
    assert "batch_size" not in protocol["features"]

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from fewstep.errors import FewstepError
from fewstep.guidance import (
    ClassLabel,
    PictureNetwork,
    PretrainedClassifier,
    load_network,
    with_weights,
)

from metric_cases import noise, random_weights


class Mean(nn.Module):
    """The mean colour of what it is shown."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))


def save_vit(folder: Path) -> Path:
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    random_weights(model)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, resample=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def test_pixels_are_normalised_once_from_minus_one_to_one() -> None:
    white, black = torch.ones(1, 3, 8, 8), -torch.ones(1, 3, 8, 8)
    seen = PictureNetwork(Mean(), mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1))
    torch.testing.assert_close(seen(white), torch.tensor([[1.0, 3.0, 7.0]]))
    torch.testing.assert_close(seen(black), torch.tensor([[-1.0, -2.0, -3.0]]))
    grey = PictureNetwork(Mean())(torch.full((1, 1, 8, 8), 0.25))
    torch.testing.assert_close(grey, torch.full((1, 3), 0.25))


def test_pictures_are_resized_with_antialiasing_and_a_gradient_beyond_the_range() -> None:
    pixels = (3 * noise(1, 3, 16, 16)).requires_grad_()
    shown = PictureNetwork(nn.Identity(), size=(8, 8))(pixels)
    expected = torch.nn.functional.interpolate(
        pixels, (8, 8), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
    assert shown.abs().max() > 1.2  # not clamped
    (gradient,) = torch.autograd.grad(shown.square().sum(), pixels)
    assert bool((gradient != 0).all())


def test_a_classifier_sees_what_its_own_processor_makes_of_a_picture(vit: Path) -> None:
    pixels = (noise(3, 3, 40, 40) * 127.5 + 127.5).round() / 127.5 - 1
    model = ViTForImageClassification.from_pretrained(vit).eval()
    images = [((p + 1) * 127.5).round().to(torch.uint8) for p in pixels]
    given = ViTImageProcessor.from_pretrained(vit)(images, return_tensors="pt")
    classifier = PretrainedClassifier(str(vit))
    with torch.no_grad():
        theirs = model(**given).logits
    torch.testing.assert_close(classifier(pixels), theirs, rtol=0, atol=0.1)  # of 8-bit resizing
    labels = torch.tensor([0, 3, 2])
    loss = ClassLabel(classifier)(pixels, labels)
    probability = classifier(pixels).softmax(1)[torch.arange(3), labels]
    torch.testing.assert_close(loss, -probability.log())
    alone = ClassLabel(classifier)(pixels[1:2], labels[1:2])
    torch.testing.assert_close(alone, loss[1:2], rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not classifier.train().training


def test_a_network_is_loaded_by_its_class_from_a_folder_or_a_file(
    vit: Path, tmp_path: Path
) -> None:
    loaded = load_network("transformers.ViTForImageClassification", str(vit))
    assert not loaded.training
    source = nn.Linear(3, 2)
    for name in ("weights.safetensors", "weights.pt"):
        path = tmp_path / name
        state = {k: v.detach().clone() for k, v in source.state_dict().items()}
        if name.endswith("pt"):
            torch.save(state, path)
        else:
            save_file(state, path)
        found = load_network("torch.nn.Linear", str(path), in_features=3, out_features=2)
        assert torch.equal(found(torch.ones(1, 3)), source(torch.ones(1, 3)))
        assert not any(p.requires_grad for p in found.parameters())


def test_weights_from_within_data_parallel_are_those_of_the_network(tmp_path: Path) -> None:
    source, path = nn.Linear(3, 2), tmp_path / "netG.pth"
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, path)
    found = with_weights(nn.Linear(3, 2), str(path))
    assert torch.equal(found(torch.ones(1, 3)), source(torch.ones(1, 3)))


def test_weights_of_another_network_are_refused(vit: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2, 3)}, path)
    with pytest.raises(FewstepError, match=r"another network than Linear.*bias"):
        with_weights(nn.Linear(3, 2), str(path))
    with pytest.raises(FewstepError, match="no weights at"):
        with_weights(nn.Linear(3, 2), str(tmp_path / "none.pt"))
    with pytest.raises(FewstepError, match=r"no class 'my_code\.Net'"):
        load_network("my_code.Net", str(path))
    with pytest.raises(FewstepError, match="which is no network"):
        load_network("pathlib.PurePath", str(path))
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "headless"
    )
    with pytest.raises(FewstepError, match="lacks 2 weights"):
        load_network("transformers.ViTForImageClassification", str(tmp_path / "headless"))


def test_the_output_that_is_meant_is_found_or_asked_for(vit: Path) -> None:
    model = load_network("transformers.ViTModel", str(vit), add_pooling_layer=False)
    tokens = PictureNetwork(model, size=(32, 32), output="last_hidden_state")(noise(2, 3, 32, 32))
    assert tokens.shape == (2, 17, 16)
    with pytest.raises(FewstepError, match="without a tensor 'maps'"):
        PictureNetwork(model, size=(32, 32), output="maps")(noise(2, 3, 32, 32))


def test_what_is_no_picture_is_refused_with_advice() -> None:
    with pytest.raises(FewstepError, match="EachFrame for videos"):
        PictureNetwork(Mean())(torch.zeros(2, 3, 4, 8, 8))
    with pytest.raises(FewstepError, match="4 channels"):
        PictureNetwork(Mean())(torch.zeros(2, 4, 8, 8))
    with pytest.raises(FewstepError, match="bilinear or bicubic"):
        PictureNetwork(Mean(), resample="lanczos")

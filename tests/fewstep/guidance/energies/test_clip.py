from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from fewstep.errors import FewstepError
from fewstep.guidance import CLIPDistance, CLIPStyle, Energy
from fewstep.metrics import CLIPFeatures, Samples

from metric_cases import noise, save_clip

PROMPTS = ["a cat", "dogs", "a red hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def test_distances_are_those_of_the_metrics_embeddings(folder: str) -> None:
    pixels = (noise(3, 3, 32, 32) * 127.5).round() / 127.5
    judge = CLIPFeatures(folder)
    judge.load(torch.device("cpu"))
    found = judge(Samples(pixels, torch.arange(3), PROMPTS))
    image, text = found["image"], found["text"]
    cosine = CLIPDistance(folder)
    distance = CLIPDistance(folder, "l2")
    target = cosine.encode(PROMPTS)
    torch.testing.assert_close(target, text)
    expected = 1 - torch.cosine_similarity(image, text)
    torch.testing.assert_close(cosine(pixels, target), expected, rtol=0, atol=0.02)  # 8 bits
    gaps = (image - text).norm(dim=1)
    torch.testing.assert_close(distance(pixels, target), gaps, rtol=0.02, atol=0)


def test_a_picture_is_at_no_distance_from_itself_and_pulls_others_towards_it(folder: str) -> None:
    energy, wanted = CLIPDistance(folder, "l2"), noise(2, 3, 40, 32, seed=1)
    target = energy.encode_images(wanted)
    torch.testing.assert_close(energy(wanted, target), torch.zeros(2), rtol=0, atol=1e-5)
    x = noise(2, 3, 40, 32).requires_grad_()
    before = energy(x, target)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    after = energy(x.detach() - 1e-4 * gradient.sign(), target)
    assert bool((after < before).all())


def made(folder: str) -> list[tuple[Energy, Any]]:
    text, style = CLIPDistance(folder), CLIPStyle(folder, layer=1)
    pictures = noise(3, 3, 32, 32, seed=5)
    return [
        (text, text.encode(PROMPTS)),
        (CLIPDistance(folder, "l2"), text.encode_images(pictures)),
        (style, style.encode_images(pictures)),
    ]


def test_no_loss_depends_on_a_batch_mate(folder: str) -> None:
    pixels = noise(3, 3, 32, 32)
    for energy, target in made(folder):
        loss = energy(pixels, target)
        assert loss.shape == (3,)
        alone = torch.cat([energy(pixels[i : i + 1], target[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)
        assert loss.unique().numel() == 3


def test_a_style_is_the_gram_matrix_of_a_layers_patches(folder: str) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = noise(2, 3, 32, 32)
    style = CLIPStyle(folder, layer=1)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (style._preparation.mean, style._preparation.std)
    )
    given = ((pixels + 1) / 2 - mean) / std
    hidden = model.vision_model(given, output_hidden_states=True).hidden_states[1][:, 1:]
    gram = hidden.mT @ hidden
    torch.testing.assert_close(style.encode_images(pixels), gram.detach(), rtol=1e-4, atol=1e-4)
    gap = (gram[0] - gram[1]).norm() / 100
    torch.testing.assert_close(style(pixels[:1], gram[1:].detach()), gap[None], rtol=1e-3, atol=0)
    shifted = pixels.roll(8, dims=3)  # whole patches: the same ones in other places
    same = style(shifted, style.encode_images(pixels)) / style(noise(2, 3, 32, 32, seed=9), gram)
    assert bool((same < 0.5).all())


def test_a_loaded_network_is_frozen_and_a_missing_target_is_refused(folder: str) -> None:
    for energy, _ in made(folder):
        network: Any = energy.network  # type: ignore[attr-defined]
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        with pytest.raises(FewstepError, match="needs a target"):
            energy(noise(1, 3, 32, 32), None)


def test_what_is_not_there_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="no folder"):
        CLIPDistance("nobody/nothing")
    with pytest.raises(FewstepError, match="cosine or l2"):
        CLIPDistance(folder, "angle")  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="layers 1 to 2"):
        CLIPStyle(folder, layer=3)

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from fewstep.errors import FewstepError
from fewstep.metrics import LPIPSDiversity, LPIPSFeatures, PairedLPIPS, Samples, to_uint8

from metric_cases import batches, measured, measured_by_ranks, noise, random_weights

Net = Literal["alex", "vgg"]


def save_backbone(folder: Path, net: Net = "alex") -> tuple[Path, Any]:
    """Random convolutions of torchvision's network in a file, and torchmetrics' LPIPS on them."""
    reference = _LPIPS(net=net, pnet_rand=True)
    random_weights(reference.net)
    state = {
        f"features.{number}.{name}": tensor
        for part in reference.net.children()
        for number, layer in part.named_children()
        for name, tensor in layer.state_dict().items()
    }
    path = folder / f"{net}.pth"
    classifier = {"classifier.6.bias": torch.zeros(1000)}  # as torchvision's files have
    torch.save({**state, **classifier}, path)
    return path, reference


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return save_backbone(tmp_path_factory.mktemp("lpips"))


def loaded(path: Path, net: Net = "alex") -> LPIPSFeatures:
    features = LPIPSFeatures(net, str(path))
    features.prepare()
    features.load(torch.device("cpu"))
    return features


@pytest.fixture(scope="module")
def features(backbone: tuple[Path, Any]) -> LPIPSFeatures:
    return loaded(backbone[0])


def distance(reference: Any, first: Tensor, second: Tensor) -> Tensor:
    seen = [to_uint8(pixels).float() / 127.5 - 1 for pixels in (first, second)]
    with torch.no_grad():
        return reference(*seen).flatten()


def check_distances(reference: Any, features: LPIPSFeatures) -> None:
    first, second = noise(3, 3, 40, 48), noise(3, 3, 40, 48, seed=1)
    expected = distance(reference, first, second)
    metric = PairedLPIPS(features)
    found = measured(metric, batches(first), batches(second))
    assert found == {"paired_lpips": pytest.approx(float(expected.mean()), rel=1e-5)}
    assert float(expected.min()) > 0.01
    same = measured(metric, batches(first), batches(first))
    assert same == {"paired_lpips": pytest.approx(0, abs=1e-7)}


def test_distances_are_torchmetrics_on_the_same_weights(
    backbone: tuple[Path, Any], features: LPIPSFeatures
) -> None:
    check_distances(backbone[1], features)


@pytest.mark.slow
def test_distances_over_vgg_are_torchmetrics_on_the_same_weights(tmp_path: Path) -> None:
    path, reference = save_backbone(tmp_path, "vgg")
    check_distances(reference, loaded(path, "vgg"))


def test_videos_are_as_far_as_their_frames_on_average(
    backbone: tuple[Path, Any], features: LPIPSFeatures
) -> None:
    first, second = noise(2, 1, 3, 32, 32), noise(2, 1, 3, 32, 32, seed=1)
    frames = [v.repeat(1, 3, 1, 1, 1).transpose(1, 2).flatten(0, 1) for v in (first, second)]
    expected = distance(backbone[1], *frames).view(2, 3).mean(1)
    found = features.distances(to_uint8(first), to_uint8(second))
    torch.testing.assert_close(found, expected)
    in_parts = copy.copy(features)
    in_parts.batch_size = 1
    small = in_parts.distances(to_uint8(first), to_uint8(second))
    torch.testing.assert_close(small, expected)


def test_diversity_is_the_mean_over_all_pairs_where_they_are_few(
    backbone: tuple[Path, Any], features: LPIPSFeatures
) -> None:
    pixels = noise(5, 3, 32, 32)
    chosen = list(combinations(range(5), 2))
    first, second = (pixels[list(side)] for side in zip(*chosen, strict=True))
    expected = float(distance(backbone[1], first, second).mean())
    found = measured(LPIPSDiversity(features), batches(pixels))
    assert found == {"lpips_diversity": pytest.approx(expected, rel=1e-5)}


def test_one_picture_again_and_again_has_no_diversity(features: LPIPSFeatures) -> None:
    same = noise(1, 3, 32, 32).expand(6, -1, -1, -1)
    found = measured(LPIPSDiversity(features), batches(same))
    assert found["lpips_diversity"] == pytest.approx(0, abs=1e-7)


def test_pairs_are_drawn_by_seed_and_not_by_order(features: LPIPSFeatures) -> None:
    pixels = noise(9, 3, 32, 32) * torch.rand(9, 1, 1, 1)

    def value(seed: int, order: list[int] | None = None) -> float:
        metric = LPIPSDiversity(features, num_pairs=4, seed=seed)
        return measured(metric, batches(pixels, 2, order=order))["lpips_diversity"]

    assert value(0) == value(0, [4, 8, 0, 2, 6, 1, 3, 7, 5])
    assert value(0) != value(1)


def test_memory_is_bounded_by_the_samples_that_pairs_are_formed_of(
    features: LPIPSFeatures,
) -> None:
    pixels = noise(60, 3, 32, 32)
    metric = LPIPSDiversity(features, most=5)
    statistics = metric.statistics()
    for batch in batches(pixels):
        statistics.update({}, batch)
        assert len(statistics) <= 2 * 5 + 3
    expected = measured(LPIPSDiversity(features), batches(pixels[:5]))
    assert metric.compute(statistics, None) == expected


def test_samples_of_one_prompt_are_compared_with_each_other_alone(
    backbone: tuple[Path, Any], features: LPIPSFeatures
) -> None:
    pixels = noise(5, 3, 32, 32) * torch.tensor([1.0, 0.2, 1.0, 0.2, 0.5]).view(5, 1, 1, 1)
    prompts = ["loud", "quiet", "loud", "quiet", "alone"]
    expected = distance(backbone[1], pixels[[0, 1]], pixels[[2, 3]]).mean()
    metric = LPIPSDiversity(features, among="same_prompt")
    found = measured(metric, batches(pixels, prompts=prompts))
    assert found == {"lpips_diversity_same_prompt": pytest.approx(float(expected), rel=1e-5)}
    for missing, message in ((None, "needs prompts"), (list("abcde"), "two samples")):
        with pytest.raises(FewstepError, match=message):
            measured(metric, batches(pixels, prompts=missing))


def test_ranks_together_say_what_one_process_says(features: LPIPSFeatures) -> None:
    samples = batches(noise(6, 3, 32, 32), 2, list("aabbab"))
    for metric in (LPIPSDiversity(features, num_pairs=3), LPIPSDiversity(features, "same_prompt")):
        whole = measured(metric, samples)
        for found in measured_by_ranks(metric, samples):
            assert found == pytest.approx(whole, rel=1e-6)


def test_too_small_or_other_things_than_pictures_are_an_error(features: LPIPSFeatures) -> None:
    for pixels, message in ((noise(3, 3, 16, 64), "32 pixels"), (noise(3, 4, 32, 32), "channels")):
        with pytest.raises(FewstepError, match=message):
            measured(LPIPSDiversity(features), batches(pixels))
    with pytest.raises(FewstepError, match="two samples"):
        measured(LPIPSDiversity(features), batches(noise(1, 3, 32, 32)))


def test_missing_and_damaged_weights_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: tuple[Path, Any]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FewstepError, match="vgg16-397923af"):
        LPIPSFeatures().prepare()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(backbone[0].read_bytes()[:-1000])
    with pytest.raises(FewstepError, match="cannot be read"):
        loaded(cut)
    other = tmp_path / "other.pth"
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), other)
    with pytest.raises(FewstepError, match="another network"):
        loaded(other)


def test_the_protocol_says_which_weights_and_pairs(features: LPIPSFeatures) -> None:
    protocol = LPIPSDiversity(features, num_pairs=7, seed=3).protocol()
    assert (protocol["most_pairs"], protocol["seed"], protocol["among"]) == (7, 3, "all")
    assert protocol["features"]["published_weights"] is False
    assert features(Samples(noise(1, 3, 32, 32), torch.arange(1))) == {}

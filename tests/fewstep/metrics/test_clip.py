from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from fewstep.errors import FewstepError
from fewstep.metrics import (
    CLIPFeatures,
    CLIPFrechetDistance,
    CLIPScore,
    FrameConsistency,
    Samples,
    frechet_distance,
    share_features,
    to_uint8,
)

from metric_cases import batches, measured, measured_by_ranks, noise, save_clip

PROMPTS = ["a cat", "dogs", "a red hat", "seas", "b", "no sun", "one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def features(folder: Path) -> CLIPFeatures:
    return loaded(folder)


def loaded(folder: Path, **options: Any) -> CLIPFeatures:
    features = CLIPFeatures(str(folder), **options)
    features.prepare()
    features.load(torch.device("cpu"))
    return features


def reference_cosines(folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    """By transformers alone: its processor, its forward pass, its logits."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    )
    given = processor(
        images=list(to_uint8(pixels)), text=prompts, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**given).logits_per_image
        return (logits / model.logit_scale.exp()).diagonal()


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (20, 57)])
def test_the_score_is_what_transformers_own_processor_and_logits_give(
    folder: Path, features: CLIPFeatures, size: tuple[int, int]
) -> None:
    pixels = noise(7, 3, *size)
    expected = 100 * float(reference_cosines(folder, pixels, PROMPTS).mean())
    found = measured(CLIPScore(features), batches(pixels, prompts=PROMPTS))
    assert found == {"clip_score": pytest.approx(expected, abs=1e-4)}
    assert expected > 3


def test_the_score_is_what_torchmetrics_says_of_the_same_model(
    folder: Path, features: CLIPFeatures
) -> None:
    def model() -> tuple[Any, Any]:
        network = CLIPModel.from_pretrained(folder).eval()
        # torchmetrics takes tensors where newer transformers give outputs with a field of them.
        plain = SimpleNamespace(
            config=network.config,
            get_image_features=lambda *given: network.get_image_features(*given).pooler_output,
            get_text_features=lambda *given: network.get_text_features(*given).pooler_output,
        )
        plain.to = lambda device: plain
        processor = CLIPProcessor(
            CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
        )
        return plain, processor

    for seed in range(3):
        pixels = noise(7, 3, 40, 40, seed=seed)
        with torch.no_grad():
            expected = float(clip_score(to_uint8(pixels), PROMPTS, model))
        found = measured(CLIPScore(features), batches(pixels, prompts=PROMPTS))
        assert found["clip_score"] == pytest.approx(expected, abs=1e-4)
        assert expected > 3


def test_a_mean_below_zero_counts_as_zero(features: CLIPFeatures) -> None:
    metric = CLIPScore(features)
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    samples = Samples(noise(2, 3, 8, 8), torch.arange(2))
    for text, expected in [([[0.6, 0.8], [0.0, 1.0]], 30.0), ([[-0.6, 0.8], [0.2, 0.0]], 20.0)]:
        statistics = metric.statistics()
        statistics.update({"image": image, "text": torch.tensor(text)}, samples)
        assert metric.compute(statistics, None)["clip_score"] == pytest.approx(expected)
    statistics = metric.statistics()
    statistics.update({"image": image, "text": -image}, samples)
    assert metric.compute(statistics, None) == {"clip_score": 0.0}


def test_of_videos_it_is_the_mean_over_frames_and_called_clipsim(features: CLIPFeatures) -> None:
    videos = noise(4, 3, 5, 32, 32)
    prompts = PROMPTS[:4]
    frames = videos.transpose(1, 2).flatten(0, 1)
    repeated = [prompt for prompt in prompts for _ in range(5)]
    of_frames = measured(CLIPScore(features), batches(frames, prompts=repeated))["clip_score"]
    found = measured(CLIPScore(features), batches(videos, prompts=prompts))
    assert found == {"clipsim": pytest.approx(of_frames, abs=1e-4)}
    assert of_frames > 3


def test_without_prompts_there_is_no_score(features: CLIPFeatures) -> None:
    with pytest.raises(FewstepError, match="have none"):
        measured(CLIPScore(features), batches(noise(4, 3, 32, 32)))


def test_long_prompts_are_cut_as_the_tokenizer_cuts_and_that_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = loaded(folder)
    long = "abcdefghijklmnopqrstuvwxyz"
    first = features.text_features([long, "short"])
    # Ten letters between the tokens of beginning and end are what twelve positions hold; the last
    # of a whole word would be another token, so the longer word must go on.
    again = features.text_features([long[:10] + "zzzz", "short"])
    other = features.text_features([long[:9] + "zzzz", "short"])
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first[0], other[0], atol=1e-3)
    assert features.truncated_prompts == 3
    warnings = [r.getMessage() for r in caplog.records if "longer" in r.getMessage()]
    assert len(warnings) == 1
    assert "1 of this batch's 2" in warnings[0]


def test_batch_size_order_and_padding_of_prompts_do_not_matter(folder: Path) -> None:
    pixels = noise(7, 3, 36, 40)
    values = [
        measured(
            CLIPScore(loaded(folder, batch_size=size)),
            batches(pixels, size, PROMPTS, order),
        )["clip_score"]
        for size, order in [(1, None), (7, None), (2, [6, 2, 0, 1, 5, 4, 3])]
    ]
    assert values == pytest.approx([values[0]] * 3, abs=1e-4)


def test_videos_features_are_those_of_their_frames(features: CLIPFeatures) -> None:
    videos = noise(2, 3, 4, 40, 32)
    found = features(Samples(videos, torch.arange(2)))["features"]
    assert found.shape == (2, 4, 16)
    for frame in range(4):
        alone = features(Samples(videos[:, :, frame], torch.arange(2)))["image"]
        torch.testing.assert_close(found[:, frame], alone, atol=1e-5, rtol=1e-4)


def test_grey_pictures_are_seen_as_colours_and_others_refused(features: CLIPFeatures) -> None:
    grey = noise(2, 1, 32, 32)
    numbers = torch.arange(2)
    seen = features(Samples(grey, numbers))["image"]
    torch.testing.assert_close(seen, features(Samples(grey.repeat(1, 3, 1, 1), numbers))["image"])
    for wrong in (noise(2, 4, 32, 32), noise(2, 7)):
        with pytest.raises(FewstepError, match="one or three"):
            features(Samples(wrong, numbers))


def test_autocast_around_it_changes_nothing(features: CLIPFeatures) -> None:
    samples = Samples(noise(2, 3, 32, 32), torch.arange(2), PROMPTS[:2])
    plain = features(samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = features(samples)
    for name, tensor in plain.items():
        assert mixed[name].dtype == torch.float32
        assert torch.equal(mixed[name], tensor)


def test_the_frechet_distance_over_clip_is_called_fd_clip(features: CLIPFeatures) -> None:
    metric = CLIPFrechetDistance(features)
    first, second = noise(40, 3, 32, 32), noise(40, 3, 32, 32, seed=1).abs()
    same = measured(metric, batches(first), batches(first, 8))
    assert same == {"fd_clip": pytest.approx(0, abs=1e-4)}
    rows = [features(Samples(p, torch.arange(40)))["image"].double() for p in (first, second)]
    moments = [moment for r in rows for moment in (r.mean(0), r.T.cov())]
    expected = float(frechet_distance(*moments))
    found = measured(metric, batches(first), batches(second))
    assert found["fd_clip"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1


def test_a_still_video_is_consistent_and_a_changing_one_less(features: CLIPFeatures) -> None:
    metric = FrameConsistency(features)
    still = noise(3, 3, 1, 32, 32).expand(-1, -1, 5, -1, -1)
    changing = noise(3, 3, 5, 32, 32)
    assert measured(metric, batches(still)) == {"frame_consistency_clip": pytest.approx(1)}
    found = measured(metric, batches(changing))["frame_consistency_clip"]
    frames = features(Samples(changing, torch.arange(3)))["image"].double()
    unit = frames / frames.norm(dim=-1, keepdim=True)
    by_hand = [float(unit[b, f] @ unit[b, f + 1]) for b in range(3) for f in range(4)]
    assert found == pytest.approx(sum(by_hand) / 12, abs=1e-5)
    assert found < 0.99


def test_pictures_have_no_successive_frames(features: CLIPFeatures) -> None:
    for pixels in (noise(3, 3, 32, 32), noise(3, 3, 1, 32, 32)):
        with pytest.raises(FewstepError, match="two frames"):
            measured(FrameConsistency(features), batches(pixels))


def test_ranks_together_say_what_one_process_says(features: CLIPFeatures) -> None:
    samples = batches(noise(7, 3, 3, 32, 32), 2, PROMPTS)
    for metric in (CLIPScore(features), FrameConsistency(features)):
        whole = measured(metric, samples)
        for found in measured_by_ranks(metric, samples):
            assert found == pytest.approx(whole, rel=1e-6)


def test_metrics_of_one_model_share_a_network(folder: Path) -> None:
    metrics = [CLIPScore(CLIPFeatures(str(folder))), FrameConsistency(CLIPFeatures(str(folder)))]
    assert len(share_features(metrics)) == 1
    assert metrics[0].features is metrics[1].features
    assert len(share_features([*metrics, CLIPScore(CLIPFeatures("another"))])) == 2


def test_the_protocol_names_model_weights_and_preparation(features: CLIPFeatures) -> None:
    protocol = CLIPScore(features).protocol()["features"]
    assert len(protocol["weights_sha256"]) == 16
    assert protocol["preparation"]["resample"] == "bicubic"
    assert protocol["preparation"]["crop"] == [32, 32]
    assert protocol["prompt_tokens"] == 12


def test_a_model_that_is_nowhere_is_an_error_that_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FewstepError, match="hf download some/model"):
        CLIPFeatures("some/model").prepare()
    with pytest.raises(FewstepError, match="hf download"):
        CLIPFeatures("/no/such/folder").prepare()


def test_a_damaged_folder_is_an_error(folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(FewstepError, match="cannot be read as CLIPModel"):
        loaded(cut.parent)
    (broken("bare") / "model.safetensors").unlink()
    with pytest.raises(FewstepError, match=r"no model\.safetensors"):
        loaded(tmp_path / "bare")
    (broken("blind") / "preprocessor_config.json").unlink()
    with pytest.raises(FewstepError, match="preprocessor_config"):
        loaded(tmp_path / "blind")


def test_without_transformers_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(FewstepError, match=r"fewstep\[transformers\]"):
        CLIPFeatures(str(folder)).prepare()


def test_loading_leaves_the_random_numbers_as_they_were(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loaded(folder)
    assert torch.equal(torch.rand(1), expected)

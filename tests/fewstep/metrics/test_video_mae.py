from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor, VideoMAEModel

from fewstep.errors import FewstepError
from fewstep.metrics import FrechetVideoMAE, Samples, VideoMAEFeatures, to_uint8

from metric_cases import batches, measured, measured_by_ranks, noise, save_clip, save_video_mae


@pytest.fixture(scope="module", params=[False, True], ids=["pretrained", "fine-tuned"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_video_mae(tmp_path_factory.mktemp("mae"), fine_tuned=request.param)


def loaded(folder: Path, **options: Any) -> VideoMAEFeatures:
    features = VideoMAEFeatures(str(folder), **options)
    features.prepare()
    features.load(torch.device("cpu"))
    return features


def processed(folder: Path, videos: Tensor) -> Tensor:
    processor = VideoMAEImageProcessor.from_pretrained(folder)
    clips = [list(video.transpose(0, 1)) for video in to_uint8(videos)]
    return processor(clips, return_tensors="pt")["pixel_values"]


def test_features_are_transformers_own(folder: Path) -> None:
    videos = noise(3, 3, 16, 40, 48)
    found = loaded(folder, batch_size=2)(Samples(videos, torch.arange(3)))["features"]
    given = processed(folder, videos)
    with torch.no_grad():
        model = VideoMAEForVideoClassification.from_pretrained(folder).eval()
        if loaded(folder).fine_tuned:
            seen: list[Tensor] = []
            model.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            model(given)
            expected = seen[0]
        else:
            encoder = VideoMAEModel.from_pretrained(folder).eval()
            expected = encoder(given).last_hidden_state.mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_value_is_not_called_fvd(folder: Path) -> None:
    videos = noise(20, 3, 16, 32, 32)
    metric = FrechetVideoMAE(loaded(folder))
    same = measured(metric, batches(videos, 5), batches(videos, 5))
    assert same == {"frechet_videomae": pytest.approx(0, abs=1e-6)}
    other = measured(metric, batches(videos, 5), batches(videos.abs(), 5))
    assert other["frechet_videomae"] > 1e-3


def test_time_reversal_changes_the_features(folder: Path) -> None:
    # Brightness jumps between the two frames of one token at the beginning, not at the end.
    videos = noise(2, 3, 16, 32, 32).cumsum(2) / 8
    features = loaded(folder)
    there, back = (
        features(Samples(v, torch.arange(2)))["features"] for v in (videos, videos.flip(2))
    )
    assert not torch.allclose(there, back, rtol=1e-3, atol=1e-3)


def test_the_control_has_its_own_name(folder: Path) -> None:
    features = loaded(folder)
    metric = FrechetVideoMAE(features, shuffle_frames=True)
    found = measured(metric, batches(noise(6, 3, 16, 32, 32)), batches(noise(6, 3, 16, 32, 32)))
    assert set(found) == {"frechet_videomae_shuffled", "frechet_videomae_shuffled_data"}
    assert metric.features.identity() != features.identity()
    assert VideoMAEFeatures("x").identity() == VideoMAEFeatures("x").identity()


def test_ranks_together_say_what_one_process_says(folder: Path) -> None:
    metric = FrechetVideoMAE(loaded(folder))
    sets = batches(noise(6, 3, 16, 32, 32), 2), batches(noise(6, 3, 16, 32, 32, seed=1))
    whole = measured(metric, *sets)
    for found in measured_by_ranks(metric, *sets):
        assert found == pytest.approx(whole, rel=1e-5)


def test_clips_are_cut_to_the_models_own_length(folder: Path) -> None:
    videos = noise(2, 3, 31, 32, 32)
    found = loaded(folder, stride=2)(Samples(videos, torch.arange(2)))["features"]
    expected = loaded(folder)(Samples(videos[:, :, ::2], torch.arange(2)))["features"]
    torch.testing.assert_close(found, expected)
    with pytest.raises(FewstepError, match="15 frames"):
        loaded(folder)(Samples(videos[:, :, :15], torch.arange(2)))


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"no model\.safetensors"):
        VideoMAEFeatures(str(tmp_path)).prepare()
    with pytest.raises(FewstepError, match="holds another model"):
        loaded(save_clip(tmp_path / "clip"))


def test_the_protocol_says_which_weights_and_frames(folder: Path) -> None:
    protocol = loaded(folder).protocol()
    assert protocol["clip_length"] == 16
    assert protocol["preparation"]["resample"] == "bilinear"
    assert len(protocol["weights_sha256"]) == 16

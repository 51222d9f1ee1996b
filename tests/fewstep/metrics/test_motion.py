from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics import MotionDifference, MotionFlow, RAFTFeatures, Samples, to_uint8

from metric_cases import batches, measured, measured_by_ranks, noise, random_weights


def moving_square(count: int, step: int, frames: int = 5) -> Tensor:
    """A white square of 4 x 4 on black that moves right in 16 x 32."""
    videos = -torch.ones(count, 1, frames, 16, 32)
    for frame in range(frames):
        start = 2 + step * frame
        videos[:, :, frame, 6:10, start : start + 4] = 1
    return videos


@pytest.mark.parametrize(("step", "changed"), [(0, 0), (1, 2 * 4), (2, 4 * 4), (5, 2 * 16)])
def test_a_moving_square_changes_its_front_and_back_columns(step: int, changed: int) -> None:
    found = measured(MotionDifference(), batches(moving_square(3, step)))
    assert found == {"motion_difference": pytest.approx(changed / (16 * 32))}


def test_motion_is_compared_with_the_data_where_there_are_data() -> None:
    fast, slow = batches(moving_square(3, 2)), batches(moving_square(4, 1))
    metric = MotionDifference()
    assert measured(metric, slow, fast) == {
        "motion_difference": pytest.approx(8 / 512),
        "motion_difference_ratio": pytest.approx(0.5),
        "motion_difference_error": pytest.approx(0.5),
    }
    assert measured(metric, fast, slow)["motion_difference_ratio"] == pytest.approx(2)
    assert measured(metric, fast, slow)["motion_difference_error"] == pytest.approx(1)
    assert set(measured(metric, fast, slow)) == set(metric.better)
    # Only the amount itself is the same whatever it is compared with.
    assert metric.own_values == set(measured(metric, fast))
    with pytest.raises(FewstepError, match="do not move at all"):
        measured(metric, fast, batches(moving_square(3, 0)))


def test_shuffling_frames_makes_more_motion_of_the_same_frames() -> None:
    videos = moving_square(2, 1, frames=9)
    shuffled = videos[:, :, torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    plain, other = (
        measured(MotionDifference(), batches(v))["motion_difference"] for v in (videos, shuffled)
    )
    assert other > 1.5 * plain
    reversed_in_time = measured(MotionDifference(), batches(videos.flip(2)))["motion_difference"]
    assert reversed_in_time == pytest.approx(plain)


def test_pictures_do_not_move() -> None:
    for pixels in (noise(2, 3, 16, 16), noise(2, 3, 1, 16, 16)):
        with pytest.raises(FewstepError, match="two frames"):
            measured(MotionDifference(), batches(pixels))
        with pytest.raises(FewstepError, match="two frames"):
            RAFTFeatures()(Samples(pixels, torch.arange(2)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = torchvision.models.optical_flow.raft_small(weights=None)
    random_weights(network)
    file = tmp_path_factory.mktemp("raft") / "raft_small.pth"
    torch.save(network.state_dict(), file)
    return file


def loaded(path: Path, updates: int = 2, **options: int) -> RAFTFeatures:
    features = RAFTFeatures("small", str(path), updates=updates, **options)
    features.prepare()
    features.load(torch.device("cpu"))
    return features


def lengths(path: Path, first: Tensor, second: Tensor) -> Tensor:
    """By torchvision's RAFT alone, of frames in [-1, 1]."""
    network = torchvision.models.optical_flow.raft_small(weights=None).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        return network(first, second, num_flow_updates=2)[-1].norm(dim=1)


def test_flow_is_torchvisions_between_successive_frames(path: Path) -> None:
    videos = noise(2, 3, 2, 128, 136)
    seen = to_uint8(videos).float() / 127.5 - 1
    expected = lengths(path, seen[:, :, 0], seen[:, :, 1]).mean((1, 2))
    features = loaded(path)
    found = features(Samples(videos, torch.arange(2)))["flow"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(found.min()) > 1e-3
    value = measured(MotionFlow(features), batches(videos))
    assert value == {"motion_flow": pytest.approx(float(found.double().mean()), rel=1e-5)}


def test_every_pair_of_successive_frames_counts_alike(path: Path) -> None:
    videos = noise(1, 3, 4, 32, 32)
    pairs = torch.cat([videos[:, :, f : f + 2] for f in range(3)])
    features = loaded(path, batch_size=2)
    whole = features(Samples(videos, torch.arange(1)))["flow"]
    single = features(Samples(pairs, torch.arange(3)))["flow"]
    torch.testing.assert_close(whole[0], single.mean(), rtol=1e-4, atol=1e-5)


def test_frames_of_odd_sizes_are_padded_and_their_own_flow_is_measured(path: Path) -> None:
    videos = noise(1, 3, 2, 60, 130)
    padded = F.pad(
        to_uint8(videos)[0].transpose(0, 1).float() / 127.5 - 1, (0, 6, 0, 68), mode="replicate"
    )
    expected = lengths(path, padded[:1], padded[1:])[:, :60, :130].mean()
    found = loaded(path)(Samples(videos, torch.arange(1)))["flow"]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_frames_can_be_brought_to_one_resolution_first(path: Path) -> None:
    small = noise(1, 3, 2, 64, 80)
    large = small.repeat_interleave(2, -1).repeat_interleave(2, -2)
    seen = [
        loaded(path, resolution=64)(Samples(v, torch.arange(1)))["flow"] for v in (small, large)
    ]
    plain = loaded(path)(Samples(small, torch.arange(1)))["flow"]
    torch.testing.assert_close(seen[0], plain)
    assert seen[1].isfinite().all()
    assert not torch.allclose(seen[1], loaded(path)(Samples(large, torch.arange(1)))["flow"])


def test_ranks_together_say_what_one_process_says(path: Path) -> None:
    sets = batches(moving_square(5, 1), 2), batches(moving_square(5, 2), 3)
    whole = measured(MotionDifference(), *sets)
    for found in measured_by_ranks(MotionDifference(), *sets):
        assert found == pytest.approx(whole, rel=1e-12)
    metric = MotionFlow(loaded(path))
    videos = batches(noise(3, 3, 2, 32, 32), 1)
    whole = measured(metric, videos)
    for found in measured_by_ranks(metric, videos):
        assert found == pytest.approx(whole, rel=1e-5)


def test_missing_and_other_weights_are_an_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FewstepError, match="raft_large_C_T_SKHT_V2-ff5fadd5"):
        RAFTFeatures().prepare()
    with pytest.raises(FewstepError, match="another network"):
        RAFTFeatures("large", str(path)).load(torch.device("cpu"))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FewstepError, match="cannot be read"):
        loaded(cut)


def test_the_protocol_says_how_flow_is_measured(path: Path) -> None:
    protocol = MotionFlow(loaded(path, resolution=96)).protocol()["features"]
    assert (protocol["size"], protocol["updates"], protocol["shorter_side"]) == ("small", 2, 96)
    assert protocol["published_weights"] is False
    assert MotionDifference().protocol() == {"metric": "motion_difference"}

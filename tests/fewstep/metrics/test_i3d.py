from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics import FVD, I3DFeatures, Samples, frechet_distance, share_features, to_uint8
from fewstep.metrics.clip_networks import ShuffledStatistics
from fewstep.metrics.frames import shuffle_frames
from fewstep.metrics.weights import file_sha256

from metric_cases import batches, measured, measured_by_ranks, noise


class TinyI3D(nn.Module):
    """Two features of frames and two of their changes, called as the real network is."""

    def forward(
        self,
        x: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        if resize:
            x = F.interpolate(x, [x.size(2), 8, 8], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        change = x[:, :, 1:] - x[:, :, :-1]
        found = [x.mean([1, 2, 3, 4]), x.square().mean([1, 2, 3, 4])]
        found += [change.square().mean([1, 2, 3, 4]), change[:, 0].abs().mean([1, 2, 3])]
        features = torch.stack(found, 1)
        return features if return_features else features.softmax(1)


class Other(nn.Module):
    """A network that takes nothing but pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def scripted(folder: Path, network: nn.Module | None = None) -> Path:
    path = folder / "i3d.pt"
    torch.jit.script(network or TinyI3D()).save(str(path))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("i3d"))


def loaded(metric_or_features: Any) -> Any:
    features = getattr(metric_or_features, "features", metric_or_features)
    features.prepare()
    features.load(torch.device("cpu"))
    return metric_or_features


def expected_features(videos: Tensor) -> Tensor:
    return TinyI3D()(to_uint8(videos).float(), True, True, True)


def drifting(count: int, seed: int = 0, step: float = 0.03) -> Tensor:
    """Videos of 16 frames that grow a little brighter with each."""
    still = 0.4 * noise(count, 3, 1, 12, 12, seed=seed)
    return still + step * torch.linspace(-8, 8, 16).view(1, 1, 16, 1, 1)


def test_the_network_is_called_on_bytes_with_its_own_resize_and_no_softmax(path: Path) -> None:
    videos = noise(5, 3, 16, 10, 14)
    found = loaded(I3DFeatures(str(path), batch_size=2))(Samples(videos, torch.arange(5)))
    assert set(found) == {"features"}
    torch.testing.assert_close(found["features"], expected_features(videos))


def test_fvd_is_the_closed_form_of_its_features_gaussians(path: Path) -> None:
    first, second = noise(60, 3, 16, 8, 8), 0.8 * noise(60, 3, 16, 8, 8, seed=1)
    rows = [expected_features(videos).double() for videos in (first, second)]
    moments = [moment for r in rows for moment in (r.mean(0), r.T.cov())]
    found = measured(loaded(FVD(I3DFeatures(str(path)))), batches(first, 7), batches(second))
    assert found == {"fvd": pytest.approx(float(frechet_distance(*moments)), rel=1e-4)}
    assert found["fvd"] > 1e-3


def test_equal_sets_have_no_distance_in_any_order(path: Path) -> None:
    videos = noise(10, 3, 16, 8, 8)
    metric = loaded(FVD(I3DFeatures(str(path))))
    found = measured(metric, batches(videos), batches(videos, 4, order=list(range(10))[::-1]))
    assert found == {"fvd": pytest.approx(0, abs=1e-9)}


def test_shuffled_frames_change_what_moves_and_not_what_is_seen(path: Path) -> None:
    features = loaded(I3DFeatures(str(path)).with_shuffled())
    videos = drifting(4)
    found = features(Samples(videos, torch.arange(4)))
    plain, shuffled = found["features"], found["shuffled"]
    torch.testing.assert_close(plain[:, :2], shuffled[:, :2], rtol=1e-4, atol=1e-5)
    assert bool((shuffled[:, 2:] > 3 * plain[:, 2:]).all())


def test_the_control_compares_shuffled_samples_with_the_data_as_they_are(path: Path) -> None:
    data, samples = drifting(40), drifting(40, seed=1)
    plain = loaded(FVD(I3DFeatures(str(path))))
    control = loaded(FVD(I3DFeatures(str(path)), shuffle_frames=True))
    found = measured(control, batches(samples), batches(data))
    bytes_of = {"fvd_shuffled": samples, "fvd_shuffled_data": data}
    for name, videos in bytes_of.items():
        by_hand = measured(plain, batches(shuffle_frames(videos, torch.arange(40))), batches(data))
        assert found[name] == pytest.approx(by_hand["fvd"], rel=1e-4)
    assert set(found) == set(bytes_of) == set(control.better)
    # A network that sees motion: the control is far worse than the distance itself.
    distance = measured(plain, batches(samples), batches(data))["fvd"]
    assert found["fvd_shuffled"] > 10 * distance


def test_a_set_that_does_not_move_does_not_care_about_shuffling(path: Path) -> None:
    control = loaded(FVD(I3DFeatures(str(path)), shuffle_frames=True))
    still = drifting(20, step=0.0)
    found = measured(control, batches(still), batches(still))
    assert found == {
        "fvd_shuffled": pytest.approx(0, abs=1e-9),
        "fvd_shuffled_data": pytest.approx(0, abs=1e-9),
    }


def test_equal_metrics_share_a_network_and_the_control_has_its_own(path: Path) -> None:
    def made(**options: Any) -> FVD:
        return FVD(I3DFeatures(str(path)), **options)

    metrics = [made(), made(), made(shuffle_frames=True), made(shuffle_frames=True)]
    assert len(share_features(metrics)) == 2
    assert metrics[0].features is metrics[1].features is not metrics[2].features
    assert metrics[2].features is metrics[3].features
    seen = I3DFeatures(str(path))
    control = FVD(seen, shuffle_frames=True)
    assert not seen.shuffled
    assert control.features.identity() != seen.identity()
    strided = FVD(I3DFeatures(str(path), stride=2))
    assert len(share_features([made(), strided])) == 2


def test_longer_clips_are_cut_to_the_first_frames_at_the_stride(path: Path) -> None:
    videos = noise(3, 3, 40, 8, 8)
    samples = Samples(videos, torch.arange(3))
    found = loaded(I3DFeatures(str(path), clip_length=10, stride=3))(samples)["features"]
    torch.testing.assert_close(found, expected_features(videos[:, :, :28:3]))


def test_clips_can_be_cropped_and_resized_first(path: Path) -> None:
    videos = torch.full((2, 3, 16, 8, 16), -1.0)
    videos[..., 4:12] = 1  # the middle square is white
    features = loaded(I3DFeatures(str(path), resolution=6))
    found = features(Samples(videos, torch.arange(2)))["features"]
    torch.testing.assert_close(found[:, 0], torch.ones(2))


def test_too_few_frames_are_an_error(path: Path) -> None:
    features = loaded(I3DFeatures(str(path)))
    with pytest.raises(FewstepError, match="12 frames; 16 at a stride of 1"):
        features(Samples(noise(2, 3, 12, 8, 8), torch.arange(2)))
    with pytest.raises(FewstepError, match="images"):
        features(Samples(noise(2, 3, 8, 8), torch.arange(2)))
    with pytest.raises(FewstepError, match="at least 9"):
        I3DFeatures(clip_length=8)
    with pytest.raises(FewstepError, match="stride"):
        I3DFeatures(stride=0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_together_say_what_one_process_says(path: Path, shuffle: bool) -> None:
    metric = loaded(FVD(I3DFeatures(str(path)), shuffle_frames=shuffle))
    sets = batches(noise(11, 3, 16, 8, 8)), batches(drifting(11))
    whole = measured(metric, *sets)
    for found in measured_by_ranks(metric, *sets):
        assert found == pytest.approx(whole, rel=1e-6)


def test_stored_statistics_of_the_control_are_the_same_again(path: Path) -> None:
    metric = loaded(FVD(I3DFeatures(str(path)), shuffle_frames=True))
    statistics = metric.statistics()
    for batch in batches(drifting(10)):
        statistics.update(metric.features(batch), batch)
    again = ShuffledStatistics()
    again.restore(statistics.tensors())
    assert metric.compute(again, statistics) == metric.compute(statistics, statistics)


def test_the_hash_is_checked_before_anything_is_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    digest = file_sha256(path)
    loaded(I3DFeatures(str(path), sha256=digest[:12]))
    monkeypatch.setattr(torch.jit, "load", refuse)
    wrong = I3DFeatures(str(path), sha256="0" * 64)
    for act in (wrong.prepare, lambda: wrong.load(torch.device("cpu"))):
        with pytest.raises(FewstepError, match="not the expected ones"):
            act()
    with pytest.raises(AssertionError, match="loaded"):
        loaded(I3DFeatures(str(path), sha256=digest))


def test_missing_and_damaged_and_other_files_are_an_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FewstepError, match=r"i3d_torchscript\.pt"):
        I3DFeatures().prepare()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FewstepError, match="cannot be read as TorchScript"):
        loaded(I3DFeatures(str(cut)))
    with pytest.raises(FewstepError, match="not the I3D of StyleGAN-V"):
        loaded(I3DFeatures(str(scripted(tmp_path, Other()))))


def test_the_protocol_says_all_that_a_value_depends_on(path: Path) -> None:
    metric = loaded(FVD(I3DFeatures(str(path), clip_length=12, stride=2, resolution=64)))
    protocol = metric.protocol()
    assert protocol["metric"] == "fvd"
    found = protocol["features"]
    assert found["weights_sha256"] == file_sha256(path)[:16]
    assert (found["clip_length"], found["stride"], found["centre_square"]) == (12, 2, 64)

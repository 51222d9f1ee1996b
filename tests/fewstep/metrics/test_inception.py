from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fewstep.errors import FewstepError
from fewstep.metrics import FID, KID, SFID, Features, InceptionFeatures, Samples, share_features
from fewstep.metrics.inception import WEIGHTS, value_name

from metric_cases import Flat, noise

CPU = torch.device("cpu")
IMAGES = torch.randint(
    0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def see(features: Features, pixels: Tensor) -> dict[str, Tensor]:
    return features(Samples(pixels, torch.arange(len(pixels))))


def in_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def features(inception_weights: Path) -> InceptionFeatures:
    found = InceptionFeatures(str(inception_weights), batch_size=2)
    found.prepare()
    found.load(CPU)
    return found


@pytest.fixture(scope="module")
def seen(features: InceptionFeatures) -> dict[str, Tensor]:
    return see(features, in_range(IMAGES))


def test_features_are_those_of_torch_fidelity(
    seen: dict[str, Tensor], inception_weights: Path
) -> None:
    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("reference", names, str(inception_weights))
    theirs = dict(zip(names, network(IMAGES), strict=True))
    for ours, name in (("features", "2048"), ("logits_unbiased", "logits_unbiased")):
        assert float(theirs[name].std(0).mean()) > 0.01
        torch.testing.assert_close(seen[ours], theirs[name], rtol=1e-5, atol=1e-5)


def test_a_video_has_the_features_of_its_frames(
    features: InceptionFeatures, seen: dict[str, Tensor]
) -> None:
    video = in_range(IMAGES).movedim(0, 1)[None]  # (1, 3, F, H, W)
    found = see(features, video)
    for name, values in found.items():
        assert values.shape == (1, 3, seen[name].shape[1])
        torch.testing.assert_close(values[0], seen[name], rtol=1e-5, atol=1e-5)


def test_a_run_in_low_precision_changes_nothing(
    features: InceptionFeatures, seen: dict[str, Tensor]
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = see(features, in_range(IMAGES[:2]))
    finally:
        torch.set_float32_matmul_precision(before)
    for name, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, seen[name][:2], rtol=1e-5, atol=1e-5)


def test_grey_images_are_seen_as_colours_that_are_equal(features: InceptionFeatures) -> None:
    grey = in_range(IMAGES[:1, :1])
    colours = see(features, grey.expand(-1, 3, -1, -1))
    assert all(torch.equal(v, colours[n]) for n, v in see(features, grey).items())


def test_only_the_8_bits_of_a_picture_count(features: InceptionFeatures) -> None:
    nearly = in_range(IMAGES[:1]) + 0.003
    exact = see(features, in_range(IMAGES[:1]))
    assert torch.equal(see(features, nearly)["features"], exact["features"])


def test_the_clean_resize_gives_other_features_under_another_name(
    seen: dict[str, Tensor], inception_weights: Path
) -> None:
    clean = InceptionFeatures(str(inception_weights), resize="clean")
    clean.load(CPU)
    found = see(clean, in_range(IMAGES[:1]))["features"]
    assert not torch.allclose(found, seen["features"][:1], rtol=0.01)
    assert (clean.name, value_name("fid", clean)) == ("inception_clean", "clean_fid")
    assert value_name("precision", Flat()) == "precision_flat"


def test_metrics_that_look_alike_share_one_network(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = inception_weights.parent, inception_weights.name
    monkeypatch.chdir(folder)
    paths = [str(inception_weights), name, str(inception_weights)]
    metrics = [
        kind(InceptionFeatures(path, batch_size=size))
        for kind, path, size in zip((FID, SFID, KID), paths, (4, 8, 16), strict=True)
    ]
    clean, published = FID(InceptionFeatures(name, resize="clean")), FID()
    networks = share_features([*metrics, clean, published])
    assert networks == [metrics[0].features, clean.features, published.features]
    assert metrics[0].features is metrics[1].features is metrics[2].features


def test_missing_weights_say_where_to_get_and_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FewstepError) as caught:
        InceptionFeatures().prepare()
    said = str(caught.value)
    for part in ("6726825d", "github.com/toshas", f"{tmp_path}/checkpoints/{WEIGHTS.name}"):
        assert part in said
    with pytest.raises(FewstepError, match=r"nowhere\.pth"):
        InceptionFeatures(str(tmp_path / "nowhere.pth")).prepare()


@pytest.mark.parametrize("given", [True, False])
def test_other_weights_under_the_published_name_are_refused(
    given: bool, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / WEIGHTS.name
    path.parent.mkdir()
    path.symlink_to(inception_weights)
    with pytest.raises(FewstepError, match="6726825d"):
        InceptionFeatures(str(path) if given else None).prepare()


def test_weights_that_are_cut_short_are_reported(inception_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes(inception_weights.read_bytes()[: 50 << 20])
    with pytest.raises(FewstepError, match=r"cut\.pth.*cannot be read"):
        InceptionFeatures(str(path)).load(CPU)


def test_weights_of_another_network_are_reported(tmp_path: Path) -> None:
    torch.save({"fc.weight": noise(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(FewstepError, match=r"other\.pth.*another network"):
        InceptionFeatures(str(tmp_path / "other.pth")).load(CPU)


def test_the_protocol_says_what_the_features_depend_on(
    features: InceptionFeatures, inception_weights: Path
) -> None:
    protocol = features.protocol()
    assert protocol["name"] == "inception"
    assert len(protocol["weights_sha256"]) == 16
    assert protocol["pixels"] == "8-bit"
    assert "bilinear" in protocol["resize"]
    assert "batch_size" not in protocol
    assert str(inception_weights) not in str(protocol)

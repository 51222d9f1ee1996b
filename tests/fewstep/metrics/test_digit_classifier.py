from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.metrics import (
    DigitClassifierFeatures,
    FrechetDistance,
    Samples,
    collect,
    digit_classifier,
)
from fewstep.metrics.digit_classifier import FILE_NAME, DigitClassifier, train_classifier

CPU = torch.device("cpu")


def numbered(images: torch.Tensor) -> Samples:
    return Samples(images, torch.arange(len(images)))


@pytest.fixture(scope="module")
def features(fewstep_cache: Path) -> DigitClassifierFeatures:
    """The features, trained on first use in this session's cache."""
    found = DigitClassifierFeatures()
    assert found.path.parent == fewstep_cache
    found.prepare()
    found.load(CPU)
    return found


def refuse_to_train() -> DigitClassifier:
    raise AssertionError("trained a second time")


def untrained_cache(folder: Path) -> DigitClassifierFeatures:
    """A cache in ``folder`` that already holds a classifier, if an untrained one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_classifier, "train_classifier", DigitClassifier)
        found = DigitClassifierFeatures(str(folder))
        found.prepare()
    return found


def test_the_classifier_knows_its_digits(features: DigitClassifierFeatures) -> None:
    images, labels = digit_classifier.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert features.network is not None
    with torch.no_grad():
        accuracy = (features.network(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.99


def test_features_are_what_the_classifier_decides_by(features: DigitClassifierFeatures) -> None:
    images, labels = digit_classifier.digits()
    found = features(numbered(images[:20]))["features"]
    assert found.shape == (20, features.protocol()["dimensions"])
    assert not found.requires_grad
    assert features.network is not None
    logits = features.network.head(found)
    assert torch.equal(logits.argmax(1), labels[:20])


def test_it_looks_at_8_bit_values_in_full_precision(features: DigitClassifierFeatures) -> None:
    images, _ = digit_classifier.digits()
    found = features(numbered(images[:8]))["features"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(numbered(images[:8] + 0.003))["features"], found)
    assert not torch.equal(features(numbered(images[:8] + 0.005))["features"], found)
    assert features.protocol()["pixels"] == "8-bit"


def test_distances_see_wrong_digits_and_not_the_order(features: DigitClassifierFeatures) -> None:
    images, _ = digit_classifier.digits()
    metric = FrechetDistance(features)
    (reference,) = collect([metric], map(numbered, images.split(256)))

    def value(samples: torch.Tensor) -> float:
        (generated,) = collect([metric], [numbered(samples)])
        return metric.compute(generated, reference)["frechet_digit_classifier"]

    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same, half, none = value(images.flip(0)), value(images[::2]), value(noise)
    assert same < 1e-3
    assert same < half < 0.1 * none


def test_the_classifier_is_trained_once_and_then_cached(
    features: DigitClassifierFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digit_classifier, "train_classifier", refuse_to_train)
    again = DigitClassifierFeatures()
    again.prepare()
    again.load(CPU)
    assert again.protocol() == features.protocol()
    images, _ = digit_classifier.digits()
    few = numbered(images[:8])
    assert torch.equal(again(few)["features"], features(few)["features"])


def test_training_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_classifier, "NUM_EPOCHS", 1)
    state = torch.get_rng_state()
    first = train_classifier().state_dict()
    torch.rand(3)  # what else was drawn does not matter
    again, other = train_classifier().state_dict(), train_classifier(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    torch.set_rng_state(state)


def test_training_leaves_the_global_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_classifier, "NUM_EPOCHS", 1)
    state = torch.get_rng_state()
    train_classifier()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_where_it_was_asked_for(tmp_path: Path) -> None:
    found = untrained_cache(tmp_path / "deep" / "cache")
    assert found.path == tmp_path / "deep" / "cache" / FILE_NAME
    assert list(found.path.parent.iterdir()) == [found.path]  # and no partial file is left


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_cache_is_reported_with_what_to_do(tmp_path: Path, share: float) -> None:
    found = untrained_cache(tmp_path)
    whole = found.path.read_bytes()
    found.path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FewstepError, match=rf"{FILE_NAME}.*Delete the file"):
        found.load(CPU)


def test_the_protocol_changes_with_the_weights(
    features: DigitClassifierFeatures, tmp_path: Path
) -> None:
    other = untrained_cache(tmp_path)
    other.load(CPU)
    assert other.protocol()["weights_sha256"] != features.protocol()["weights_sha256"]
    assert other.protocol()["name"] == features.protocol()["name"] == "digit_classifier"

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance import ClassLabel, Energy, GuidanceDistance, MapDistance, Target
from fewstep.metrics import Samples, collect

NUMBERS = torch.arange(4)


def classifier(seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).requires_grad_(False).eval()


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 256, (4, 3, 4, 4), generator=generator)
    return steps / 127.5 - 1


LABELS = torch.tensor([1, 7, 3, 3])


def measured(metric: GuidanceDistance, *batches: Samples) -> float:
    (found,) = collect([metric], list(batches))
    (value,) = metric.compute(found, None).values()
    return value


def test_it_is_the_mean_of_the_energy_against_each_samples_own_target() -> None:
    energy = ClassLabel(classifier())
    parts = [
        Samples(pixels()[rows], NUMBERS[rows], cond={"class_labels": LABELS[rows]})
        for rows in (slice(0, 3), slice(3, 4))
    ]
    wanted = float(energy(pixels(), LABELS).mean())
    assert measured(GuidanceDistance(energy), *parts) == pytest.approx(wanted, rel=1e-5)


def test_targets_are_made_of_pictures_and_of_captions() -> None:
    maps = MapDistance(nn.Conv2d(3, 2, 3).requires_grad_(False).eval())
    like = pixels().flip(0)
    metric = GuidanceDistance(maps, "like", pictures=True)
    wanted = float(maps(pixels(), maps.encode_images(like)).mean())
    samples = Samples(pixels(), NUMBERS, cond={"like": like})
    assert measured(metric, samples) == pytest.approx(wanted, rel=1e-5)
    assert metric.needs_conditions == ("like",)

    class Length(Energy):
        """How far a sample's sum is from the number of letters."""

        def encode(self, prompts: Sequence[str]) -> Tensor:
            return torch.tensor([float(len(prompt)) for prompt in prompts])

        def __call__(self, x0: Tensor, target: Target) -> Tensor:
            assert isinstance(target, Tensor)
            return (x0.flatten(1).sum(1) - target).abs()

    prompts = ["a", "bcd", "", "efghi"]
    lengths = torch.tensor([1.0, 3.0, 0.0, 5.0])
    told = GuidanceDistance(Length(), "prompt")
    wanted = float((pixels().flatten(1).sum(1) - lengths).abs().mean())
    assert measured(told, Samples(pixels(), NUMBERS, prompts)) == pytest.approx(wanted, rel=1e-5)
    assert told.needs_prompts
    assert told.needs_conditions == ()


def test_it_names_its_guide_and_no_judge() -> None:
    network = classifier()
    metric = GuidanceDistance(ClassLabel(network))
    assert list(metric.guides()) == [network]
    assert list(metric.judges()) == []


def test_its_protocol_is_plain_and_tells_networks_and_targets_apart() -> None:
    def protocol(seed: int, target: str = "class_labels") -> str:
        return json.dumps(GuidanceDistance(ClassLabel(classifier(seed)), target).protocol())

    assert protocol(5) == protocol(5)
    assert len({protocol(5), protocol(6), protocol(5, "other")}) == 3


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(FewstepError, match="tell ClassLabel of captions"):
        GuidanceDistance(ClassLabel(classifier()), "prompt")
    with pytest.raises(FewstepError, match="tell ClassLabel of pictures"):
        GuidanceDistance(ClassLabel(classifier()), "like", pictures=True)
    with pytest.raises(FewstepError, match="'class_labels', which these samples were not given"):
        measured(GuidanceDistance(ClassLabel(classifier())), Samples(pixels(), NUMBERS))

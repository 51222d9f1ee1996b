"""Two configurations are described alike if and only if they do the same."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.guidance import CLIPDistance, CLIPStyle, EmbeddingDistance, PictureNetwork, Sum
from fewstep.guidance.described import described

from metric_cases import save_clip


class Plain:
    """An object like those that energies are made of."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)
        self._private = object()

    def method(self) -> None:
        """Does nothing."""


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed))


DIFFERENT: list[tuple[Any, Any]] = [
    (Plain(form="l2"), Plain(form="cosine")),
    ({"a": Plain(x=1)}, {"a": Plain(x=2)}),
    ([Plain(x=1)], [Plain(x=2)]),
    ((Plain(x=1), 2.5), (Plain(x=1), 3.5)),
    (partial(min, 1), partial(min, 2)),
    (partial(min, key=1), partial(min, key=2)),
    (min, max),
    (Plain(x=1).method, Plain(x=2).method),
    ({"a", "b"}, {"a", "c"}),
    (Path("a"), Path("b")),
    (torch.float32, torch.float64),
    (weights(), torch.cat([weights()[:-1], torch.zeros(1)])),
    (weights()[:3], weights()[1:4]),
    (float("inf"), float("-inf")),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_is_described_differently_in_plain_values(one: Any, other: Any) -> None:
    found = described(one)
    assert found != described(other)
    assert json.loads(json.dumps(found)) == found
    assert " at 0x" not in json.dumps(found)


def test_the_same_is_described_alike_wherever_it_lies() -> None:
    one, other = ({"a": [Plain(x=(1, Plain(y=weights())))]} for _ in range(2))
    assert described(one) == described(other)


def test_what_holds_itself_has_an_end() -> None:
    thing = Plain()
    thing.me = [thing]  # type: ignore[attr-defined]
    assert described(thing) == {"class": "Plain", "me": [{"class": "Plain"}]}


def test_energies_of_clip_are_told_apart(tmp_path: Path) -> None:
    first, second = (str(save_clip(tmp_path / name)) for name in "ab")
    energies = [CLIPDistance(first), CLIPDistance(first, "l2"), CLIPStyle(first, layer=1)]
    energies += [CLIPStyle(first, layer=1, divisor=1.0), CLIPStyle(first, layer=2)]
    found = [json.dumps(described(energy)) for energy in energies]
    assert len(set(found)) == len(energies)
    assert json.dumps(described(CLIPDistance(second))) == found[0]  # the same weights
    summed = [described(Sum({"clip": energy})) for energy in energies]
    assert all(one != other for one, other in itertools.pairwise(summed))


def test_networks_with_the_same_weights_are_told_apart_by_what_they_are_shown() -> None:
    network = torch.nn.Conv2d(3, 1, 3)
    shown = [PictureNetwork(network, mean=(mean,) * 3) for mean in (0.5, 0.4)]
    first, second = (described(EmbeddingDistance(one))["network"] for one in shown)
    assert first["sha256"] == second["sha256"]
    assert first != second

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance import (
    ClassLabel,
    CLIPDistance,
    CLIPStyle,
    Energy,
    Judge,
    LinearMeasurement,
    Matrix,
)
from fewstep.guidance.judge import refuse_guide_as_judge
from fewstep.guidance.tuners import EnergyTuner

from metric_cases import save_clip


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).eval()


class Accuracy(Judge):
    """Whether whatever it holds, a network at last, says the class that was wanted."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, samples: Tensor, target: Any) -> Tensor:
        return (self.held(samples).argmax(1) == target).double()


def test_a_class_that_is_both_guide_and_judge_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="both a Judge and an Energy"):

        class Both(Judge, ClassLabel):  # type: ignore[misc]
            pass

    with pytest.raises(TypeError, match="cannot judge its own"):

        class Other(ClassLabel, Judge):  # type: ignore[misc]
            pass


def test_an_energy_is_no_judge() -> None:
    energy = ClassLabel(network())
    with pytest.raises(FewstepError, match="ClassLabel is no Judge"):
        refuse_guide_as_judge(energy, ClassLabel(network(1)))  # type: ignore[arg-type]


def test_a_judge_with_a_network_of_its_own_is_welcome() -> None:
    refuse_guide_as_judge(Accuracy(network(1)), ClassLabel(network()))
    refuse_guide_as_judge(Accuracy(nn.Linear(4, 3)), ClassLabel(network()))
    refuse_guide_as_judge(Accuracy(lambda x: x), LinearMeasurement(Matrix(torch.eye(2))))


@pytest.mark.parametrize(
    "disguise",
    [
        lambda net: net,
        copy.deepcopy,
        lambda net: {"readers": [net]},
        lambda net: nn.Sequential(nn.Identity(), net),
        lambda net: net.forward,
        lambda net: copy.deepcopy(net).double(),
    ],
    ids=["itself", "copy", "contained", "wrapped", "bound", "converted"],
)
def test_the_guides_network_is_refused_in_every_disguise(disguise: Any) -> None:
    guide = network()
    with pytest.raises(FewstepError, match="looks through the network of the guide"):
        refuse_guide_as_judge(Accuracy(disguise(guide)), ClassLabel(guide))


def test_a_judge_that_asks_the_guides_energy_is_refused_without_any_network() -> None:
    energy: Energy = LinearMeasurement(Matrix(torch.eye(2)))
    with pytest.raises(FewstepError, match="holds the guide's own energy"):
        refuse_guide_as_judge(Accuracy(energy), energy)


def test_a_part_of_the_guides_network_is_no_judge_either(tmp_path: Path) -> None:
    folder = str(save_clip(tmp_path))
    guide, tuner = CLIPStyle(folder, layer=1), EnergyTuner(CLIPDistance(folder))
    with pytest.raises(FewstepError, match="looks through the network of the guide"):
        refuse_guide_as_judge(tuner, guide)
    refuse_guide_as_judge(tuner, ClassLabel(network()))

from __future__ import annotations

import inspect
import io
from pathlib import Path

import pytest
import torch

from fewstep.diffusion import Backbone, FlowSchedule, Schedule, VPSchedule
from fewstep.errors import FewstepError
from fewstep.networks import DiT, RingMixture
from fewstep.spec import Describable, build, default_at, defaults_of, describe, with_defaults

THINGS = [
    (VPSchedule("linear", 0.0001, 0.02, trajectory_end="clean"), Schedule),
    (FlowSchedule(3.0, "logit_normal"), Schedule),
    (DiT(sample_size=4, channels=1, num_layers=1, num_heads=1, head_dim=8), Backbone),
    (RingMixture(FlowSchedule(2.0), num_modes=3, width=8), Backbone),
]


@pytest.mark.parametrize(("thing", "expected"), THINGS)
def test_what_is_described_is_rebuilt_even_after_a_safe_load(
    thing: Describable, expected: type
) -> None:
    file = io.BytesIO()
    torch.save(describe(thing), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)  # plain values only, or this refuses
    rebuilt = build(stored, expected)
    assert type(rebuilt) is type(thing)
    assert describe(rebuilt) == describe(thing)


def test_a_description_is_in_the_form_of_an_experiment_file() -> None:
    description = describe(FlowSchedule(3.0))
    assert description["class_path"] == "fewstep.diffusion.schedules.FlowSchedule"
    assert description["init_args"]["shift"] == 3.0


def test_a_description_is_not_changed_through_the_object(tmp_path: Path) -> None:
    schedule = FlowSchedule(3.0)
    describe(schedule)["init_args"]["shift"] = 1.0
    assert schedule.config["shift"] == 3.0


def test_a_callable_that_is_no_backbone_is_never_called(tmp_path: Path) -> None:
    flag = tmp_path / "called"
    for spec in (
        {"class_path": "os.system", "init_args": {"command": f"touch {flag}"}},
        {"class_path": "os.makedirs", "init_args": {"name": str(flag)}},
        {"class_path": "pathlib.Path", "init_args": {}},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
        # One of ours, but not what belongs there.
        {"class_path": "fewstep.diffusion.schedules.VPSchedule", "init_args": {}},
    ):
        with pytest.raises(FewstepError, match=f"{spec['class_path']}' where a Backbone belongs"):
            build(spec, Backbone)
    assert not flag.exists()


@pytest.mark.parametrize("path", ["no_such_package.Net", "fewstep.networks.NoSuchNet", "Net", ""])
def test_a_class_that_cannot_be_found_is_named(path: str) -> None:
    with pytest.raises(FewstepError, match=f"class '{path}', which cannot be imported"):
        build({"class_path": path, "init_args": {}}, Backbone)


def test_an_option_that_an_older_description_lacks_has_its_default() -> None:
    network = DiT(sample_size=4, channels=1, num_layers=1, num_heads=1, head_dim=8)
    older = describe(network)
    del older["init_args"]["learned_variance"]
    listed = {"roles": [older, "missing.Class", {"class_path": "missing.Class", "init_args": {}}]}
    whole = with_defaults({"roles": [describe(network), *listed["roles"][1:]]})
    assert with_defaults(listed) == whole
    assert whole["roles"][0]["init_args"]["learned_variance"] is False
    other = describe(DiT(4, 1, num_layers=1, num_heads=1, head_dim=8, learned_variance=True))
    assert with_defaults(other) != whole["roles"][0]


@pytest.mark.parametrize(
    ("class_path", "path", "default"),
    [
        ("lightning_modules.DiffusionTraining", "sampler", "ode"),
        ("lightning_modules.DiffusionTraining", "clip_from", 0),  # of a base class
        ("lightning_modules.TrainingFreeGuidance", "steering.candidates", 1),  # of a dataclass
        ("fewstep.guidance.Guidance", "recurrence.count", 1),
        ("fewstep.guidance.PictureNetwork", "mean", [0.5, 0.5, 0.5]),  # a tuple in Python
        ("fewstep.guidance.Sum", "weights", {}),  # made anew each time
        ("fewstep.guidance.dps", "strength", 1.0),  # of a function
    ],
)
def test_defaults_are_those_that_a_configuration_shows(
    class_path: str, path: str, default: object
) -> None:
    assert default_at(class_path, path.split(".")) == default


def test_what_has_no_default_or_cannot_be_found_has_none() -> None:
    empty = inspect.Parameter.empty
    assert default_at("fewstep.guidance.Sum", ["parts"]) is empty
    assert default_at("fewstep.networks.DiT", ["sampl_size"]) is empty
    assert default_at("nowhere.Class", ["a", "b"]) is empty
    assert defaults_of(".a.b") == {}
    assert "sample_size" not in defaults_of("fewstep.networks.DiT")
    assert "training" not in defaults_of("fewstep.networks.DiT")  # hands nothing on to a module

"""`fewstep guidance search` on a closed form: a mixture whose denoiser is guided to a mode."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance import (
    Capped,
    Guidance,
    Judge,
    MixtureLikelihood,
    NoiseOptimisation,
    Polyak,
    methods,
)
from fewstep.guidance.energies import Target
from fewstep.guidance.knobs import read_number
from fewstep.networks import ring
from scripts.experiments import find_experiment, known_experiments
from scripts.guidance.knobs import chosen_knobs, strengths
from scripts.guidance.overlay import ARGUMENTS, Overlay
from scripts.main import run

EXPERIMENT = "guidance/analytic/polyak"  # within a cap, so that no strength diverges
RANGE = ["--begin", "0.1", "--factor", "2"]
CALLS: list[int] = []


@dataclass(frozen=True)
class Planted(Judge):
    """Likes sets of samples whose mean distance from the origin is this."""

    radius: float = 0.0

    def __call__(self, samples: Tensor, target: Target) -> Tensor:
        CALLS.append(len(samples))
        return -(samples.norm(dim=1).mean() - self.radius).abs().expand(len(samples))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant(0.0)


def plant(radius: float) -> None:
    choice = {"class_path": f"{__name__}.Planted", "init_args": {"radius": radius}}
    Path("tuner.yaml").write_text(yaml.safe_dump({"tuner": choice}))


def search(*more: str, experiment: str = EXPERIMENT) -> None:
    CALLS.clear()
    few = ["--steps", "4", "--num_samples", "32", "--trainer.accelerator", "cpu"]
    named = ["-c", experiment, "-c", "tuner.yaml", "--run.name", experiment]
    if experiment == EXPERIMENT:
        named += ["--model.init_args.steering.guidance.init_args.strength", "0.1"]
    run(["guidance", "search", *named, *few, *more])


def folder(name: str = "4_steps", experiment: str = EXPERIMENT) -> Path:
    return Path("runs") / experiment / "search" / name


def trials(*where: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder(*where) / "trials.jsonl").read_text().splitlines())
    return [record["trial"] for record in records if "trial" in record]


def strength_in(path: Path) -> float:
    content = yaml.safe_load(path.read_text())["model"]["init_args"]["steering"]["guidance"]
    return float(content["init_args"]["strength"])


def test_what_tfg_turns_grows_by_tfgs_factors_unless_told_otherwise() -> None:
    start = methods.tfg(MixtureLikelihood(ring(5)), copies=2)
    names = "state.strength,clean.strength,smoothing.scale,clean_iterations"
    found = chosen_knobs(start, names, 0.5, None, 3)
    assert [knob.factor for knob in found] == [2, 2, 10, 2]
    assert [knob.cap for knob in found] == pytest.approx([0.5, 0.5, 0.05, 16])
    told = chosen_knobs(start, names, 0.5, 3.0, 3)
    assert [knob.factor for knob in told] == [3, 3, 3, 3]


@pytest.mark.slow
def test_a_search_among_candidates_counts_them_all() -> None:
    search("--trials", "1", "--model.init_args.steering.candidates", "2")
    (tried,) = trials()
    assert tried["denoiser_evaluations"] == 2 * 4
    assert tried["energy_evaluations"] == 2 * (4 + 1)


def test_the_search_of_initial_noise_can_be_tuned_too() -> None:
    model = yaml.safe_load(find_experiment(EXPERIMENT).read_text())["model"]
    steering = model["init_args"]["steering"]
    polyak = {"class_path": "fewstep.guidance.Polyak", "init_args": {"strength": 1.0}}
    rule = {"class_path": "fewstep.guidance.Capped", "init_args": {"rule": polyak, "radius": 0.2}}
    energy = steering["guidance"]["init_args"]["energy"]
    steering["guidance"] = {
        "class_path": "fewstep.guidance.NoiseOptimisation",
        "init_args": {"energy": energy, "rule": rule, "iterations": 2},
    }
    defaults = {"data": {"class_path": "datamodules.RingData"}, "trainer": {"max_steps": 0}}
    Path("noise.yaml").write_text(yaml.safe_dump({"model": model, **defaults}))
    search("--trials", "2", "--knobs", "rule.radius", experiment="noise.yaml")
    best = Path("runs/noise.yaml/search/4_steps/best.yaml")
    written = yaml.safe_load(best.read_text())["model"]["init_args"]["steering"]["guidance"]
    assert written["class_path"] == "fewstep.guidance.NoiseOptimisation"
    assert written["init_args"]["rule"]["init_args"]["radius"] in (0.05, 0.1)
    noise = NoiseOptimisation(MixtureLikelihood(ring(5)), Capped(Polyak(1.0), 0.2))
    assert strengths(noise) == ["rule.rule.strength"]


@pytest.mark.slow
def test_the_setting_that_a_tuner_wants_is_found_and_its_overlay_sets_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search(*RANGE)
    tried = trials()
    values = [trial["values"]["state.rule.strength"] for trial in tried]
    assert values == pytest.approx([0.01 * 2**k for k in range(6)])
    radii = [-trial["score"] for trial in tried]
    assert len(set(radii)) == 6
    for wanted in (2, 4):
        plant(radii[wanted])
        search(*RANGE, "--name", f"wants_{wanted}")
        assert strength_in(folder(f"wants_{wanted}") / "best.yaml") == pytest.approx(values[wanted])
    capsys.readouterr()
    best = folder("wants_4") / "best.yaml"
    with pytest.raises(SystemExit):
        run(["evaluate", "-c", EXPERIMENT, "-c", str(best), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    guidance = config["model"]["init_args"]["steering"]["guidance"]
    assert guidance["init_args"]["strength"] == pytest.approx(values[4])
    assert guidance["init_args"]["energy"]["class_path"] == "fewstep.guidance.MixtureLikelihood"
    assert config["model"]["init_args"]["step_counts"] == [20, 50]
    assert config["run"]["name"] == f"{EXPERIMENT}+tuned"


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    search("--trials", "4")
    whole, told = trials(), capsys.readouterr().out
    path = folder() / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 2 + 4  # what it is, unguided samples, trials
    path.write_text("".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote
    search("--trials", "4")
    assert len(CALLS) == 2 * 2  # each new trial, once a number of steps and once in all
    again = trials()
    for before, after in zip(whole, again, strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert capsys.readouterr().out == told
    search("--trials", "5")
    assert (len(CALLS), len(trials())) == (2, 5)  # and farther


@pytest.mark.slow
def test_every_method_gets_as_many_trials_whatever_number_of_knobs_it_has() -> None:
    other = "guidance/analytic/dps"
    search("--trials", "3")
    search("--trials", "3", experiment=other)
    search("--trials", "3", "--knobs", "state.rule.strength,state.radius", "--name", "both")
    assert [len(found) for found in (trials(), trials("4_steps", other), trials("both"))] == [3] * 3
    (first, *raised) = [trial["values"] for trial in trials("both")]
    assert first == {"state.rule.strength": 0.025, "state.radius": 0.05}
    assert {tuple(one.values()) for one in raised} == {(0.05, 0.05), (0.025, 0.1)}
    init = yaml.safe_load((folder("both") / "best.yaml").read_text())["model"]["init_args"]
    assert set(init["steering"]["guidance"]["init_args"]) == {"strength", "cap"}


@pytest.mark.slow
def test_time_travel_is_searched_like_a_strength() -> None:
    search("--knobs", "recurrence.count", "--trials", "3", "--name", "travel")
    tried = trials("travel")
    assert [trial["values"]["recurrence.count"] for trial in tried] == [1, 2, 4]
    assert [trial["denoiser_evaluations"] for trial in tried] == [4, 8, 16]
    best = max(tried, key=lambda trial: float(trial["score"]))["values"]["recurrence.count"]
    config = yaml.safe_load((folder("travel") / "best.yaml").read_text())
    guidance = config["model"]["init_args"]["steering"]["guidance"]
    assert guidance["init_args"]["recurrence"] == {"count": best}
    both = "state.rule.strength,recurrence.count"
    search("--knobs", both, "--trials", "3", "--name", "both")
    assert [tuple(trial["values"].values()) for trial in trials("both")] == [
        (0.025, 1),
        (0.05, 1),
        (0.025, 2),
    ]


@pytest.mark.slow
def test_a_setting_too_far_from_data_cannot_win(capsys: pytest.CaptureFixture[str]) -> None:
    search(*RANGE, "--max_distance", "1000")
    records = [json.loads(line) for line in (folder() / "trials.jsonl").read_text().splitlines()]
    plain = records[1]["unguided"][0]["distance"]
    ratios = [record["steps"][0]["distance"] / plain for record in records[2:]]
    bound = sum(sorted(ratios)[2:4]) / 2
    scores = [trial["score"] for trial in trials()]
    capsys.readouterr()
    search(*RANGE, "--max_distance", str(bound), "--name", "bound")
    told = capsys.readouterr().out
    assert [trial["failure"] is None for trial in trials("bound")] == [r <= bound for r in ratios]
    within = max(score for score, ratio in zip(scores, ratios, strict=True) if ratio <= bound)
    best = trials()[scores.index(within)]["values"]["state.rule.strength"]
    assert strength_in(folder("bound") / "best.yaml") == pytest.approx(best)
    assert f"times as far from data as unguided samples; the bound is {bound:g}" in told
    assert f"nearest_data_ratio at most {bound:g} times that of unguided samples" in told
    with pytest.raises(FewstepError, match="All 2 trials of the search failed"):
        search("--trials", "2", "--max_distance", "0.01", "--name", "none")


def test_records_of_another_search_are_not_mixed_in() -> None:
    search("--trials", "1")
    with pytest.raises(FewstepError, match="of another search: seed was different"):
        search("--trials", "1", "--seed", "3")


def digits(part: str) -> list[str]:
    """A search on digits by a network of a part of them."""
    reader = {"class_path": "fewstep.metrics.digit_reader", "init_args": {"part": part}}
    network = {"sample_size": 8, "channels": 1, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    start = {
        "class_path": "fewstep.diffusion.Denoiser",
        "init_args": {
            "backbone": {"class_path": "fewstep.networks.DiT", "init_args": network},
            "schedule": {"class_path": "fewstep.diffusion.VPSchedule"},
            "prediction_type": "v_prediction",
        },
    }
    kind = {"class_path": "fewstep.guidance.tuners.ClassTuner", "init_args": {"classifier": reader}}
    Path("tuner.yaml").write_text(yaml.safe_dump({"tuner": kind}))
    return ["--model.init_args.start", json.dumps(start)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        pytest.param("guide", "looks through the network of the guide", marks=pytest.mark.slow),
        ("judge", "is the judge of this experiment's ClassAccuracy"),
    ],
)
def test_neither_guide_nor_judge_may_tune(part: str, message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        search(*digits(part), experiment="guidance/digits/dps")
    assert not folder("4_steps", "guidance/digits/dps").exists()


def test_what_is_missing_or_cannot_be_turned_is_named() -> None:
    with pytest.raises(FewstepError, match="no guidance to search for"):
        search(experiment="guidance/analytic/unguided")
    with pytest.raises(FewstepError, match="has no number 'state"):
        search("--knobs", "state.rul")
    with pytest.raises(FewstepError, match="cannot be set in the arguments of"):
        search("--knobs", "smoothing.copies")
    Path("tuner.yaml").write_text("{}")
    with pytest.raises(FewstepError, match="A search needs a tuner"):
        search()
    with pytest.raises(FewstepError, match="one action, search, not 'serch'"):
        run(["guidance", "serch"])


def test_files_of_search_options_are_no_experiments() -> None:
    assert "guidance/digits/few_polyak" in known_experiments()
    assert not [name for name in known_experiments() if name.endswith("search")]


@pytest.mark.parametrize("name", ["dps", "lgd_mc", "freedom", "mpgd", "tfg", "augmented_polyak"])
def test_every_strength_of_a_method_has_its_place_in_the_configuration(name: str) -> None:
    """A value written there comes back as the field that was searched."""
    energy = MixtureLikelihood(ring(5))
    fields = strengths(getattr(methods, name)(energy))
    assert fields
    plain = {argument: None for argument in ARGUMENTS[name].values() if "." not in argument}
    kind = {"class_path": f"fewstep.guidance.{name}", "init_args": plain}
    model = {"class_path": "M", "init_args": {"steering": {"guidance": kind}}}
    overlay = Overlay.of(model, fields)
    content = overlay.content(dict.fromkeys(fields, 0.7), "run")
    written = content["model"]["init_args"]["steering"]["guidance"]
    guidance: Guidance = getattr(methods, name)(energy, **written["init_args"])
    assert [read_number(guidance, field) for field in fields] == [0.7] * len(fields)


def test_an_overlay_names_the_classes_on_its_way_again() -> None:
    """Else what the experiment says beside the number would be lost."""
    rule = {"class_path": "fewstep.guidance.Polyak", "init_args": {"strength": 0.1, "gap": "loss"}}
    capped = {"class_path": "fewstep.guidance.Capped", "init_args": {"rule": rule, "radius": 0.2}}
    state = {"class_path": "fewstep.guidance.Guidance", "init_args": {"state": capped}}
    model = {"class_path": "M", "init_args": {"steering": {"guidance": state}}}
    content = Overlay.of(model, ["state.rule.strength"]).content({"state.rule.strength": 3.0}, "x")
    guidance = content["model"]["init_args"]["steering"]["guidance"]
    inner = guidance["init_args"]["state"]["init_args"]["rule"]
    assert (guidance["class_path"], inner["class_path"]) == (
        "fewstep.guidance.Guidance",
        "fewstep.guidance.Polyak",
    )
    assert inner["init_args"] == {"strength": 3.0}


def test_a_class_tuner_gives_the_probability_of_the_wanted_class() -> None:
    from fewstep.guidance.tuners import ClassTuner

    tuner = ClassTuner(torch.nn.Identity(), shift=1.0, factor=0.5)
    logits = torch.tensor([[3.0, -1.0], [-1.0, -1.0]])
    found = tuner(logits, torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([1 / (1 + 2.718281828**-2), 0.5])
    with pytest.raises(FewstepError, match="takes the number of a class"):
        tuner(logits, None)


def networks_in(value: Any) -> set[str]:
    """The names of pretrained networks anywhere in a configuration."""
    if isinstance(value, list):
        return set().union(*map(networks_in, value))
    if not isinstance(value, dict):
        return set()
    own = {value["model"]} if isinstance(value.get("model"), str) else set()
    return own.union(*map(networks_in, value.values()))


@pytest.mark.parametrize("folder", ["imagenet", "sd15", "sdxl"])
def test_no_folders_tuner_guides_or_judges(folder: str) -> None:
    files = sorted(find_experiment(f"guidance/{folder}/defaults").parent.glob("*.yaml"))
    configs = {file.stem: networks_in(yaml.safe_load(file.read_text())) for file in files}
    tuner = configs.pop("search")
    assert len(tuner) == 1
    assert len(set().union(*configs.values())) >= 2
    assert all(tuner.isdisjoint(found) for found in configs.values())

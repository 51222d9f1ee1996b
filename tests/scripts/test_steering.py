"""Training-free guidance as a user meets it: an experiment, an option, a suite's run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.errors import FewstepError
from scripts.experiments import expand_steering
from scripts.main import run

METRIC = {"class_path": "fewstep.metrics.SlicedWasserstein"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "small.yaml")
    return tmp_path


def small(path: Path, metrics: list[dict[str, Any]] | None = None) -> None:
    """A run that measures few samples on the CPU."""
    evaluation = {"metrics": metrics or [METRIC], "num_samples": 64}
    callbacks = [
        {"class_path": "callbacks.Samples", "init_args": {"count": 8}},
        {"class_path": "callbacks.Evaluation", "init_args": evaluation},
    ]
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "accelerator": "cpu"}}))


def command(name: str, experiment: str, *more: str) -> None:
    named = ["--run.name", experiment]
    run([name, "-c", experiment, "-c", "small.yaml", *named, *more])


def results(run_folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path("runs") / run_folder / "results.json").read_text())
    return content


def values(run_folder: str) -> list[float]:
    return [m["value"] for m in results(run_folder)["measurements"]]


def test_an_experiment_that_trains_nothing_is_measured_and_drawn_at_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--model.init_args.step_counts", "[4]"]
    command("fit", "guidance/analytic/polyak", *steps)
    assert "TrainingFreeGuidance trains nothing (trainer.max_steps: 0)" in capsys.readouterr().out
    found = results("guidance/analytic/polyak/version_0")
    (entry,) = found["measurements"]
    assert (found["method"], found["student_updates"]) == ("TrainingFreeGuidance", 0)
    assert (entry["num_steps"], entry["network_evaluations"]) == (4, 4)
    assert entry["cost"]["denoiser_gradients"] == 4
    assert entry["cost"]["energy_evaluations"] == 4
    assert found["source"]["steering"]["guidance"]["state"]["radius"] == 0.2
    folder = Path("runs/guidance/analytic/polyak/version_0")
    with (folder / "guidance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [0, 1, 2, 3]
    assert {row["samples"] for row in rows} == {"64"}
    assert all(float(row["displacement"]) > 0 for row in rows[:-1])
    assert list((folder / "samples").glob("*.png"))
    command("fit", "guidance/analytic/polyak", *steps, "--ckpt_path", "last")
    assert "there is nothing left to do" in capsys.readouterr().out
    before = values("guidance/analytic/polyak/version_0")
    weaker = ["--model.init_args.steering.guidance.init_args.strength", "0.01"]
    command("fit", "guidance/analytic/polyak", *steps, *weaker, "--ckpt_path", "last")
    assert "What is left is its evaluation" in capsys.readouterr().out
    assert values("guidance/analytic/polyak/version_0") != before
    run(["report", "runs", "--out", "report.html"])
    assert "guidance/analytic/polyak" in Path("report.html").read_text()


def test_measuring_one_needs_no_earlier_run(here: Path) -> None:
    command("evaluate", "guidance/analytic/dps", "--steps", "3")
    assert [m["num_steps"] for m in results("guidance/analytic/dps/version_0")["measurements"]] == [
        3
    ]


@pytest.mark.slow
def test_an_option_steers_as_the_experiment_does_and_keeps_its_results_apart(here: Path) -> None:
    """The same network, guidance, noise and targets: the same numbers to the last bit."""
    command("fit", "guidance/analytic/unguided", "--model.init_args.step_counts", "[4]")
    command("evaluate", "guidance/analytic/polyak", "--steps", "4")
    plain = values("guidance/analytic/unguided/version_0")
    option = ["--steps", "4", "--steering", "guidance/analytic/polyak"]
    command("evaluate", "guidance/analytic/unguided", *option)
    steered = "guidance/analytic/unguided+polyak/version_0"
    assert values(steered) == values("guidance/analytic/polyak/version_0") != plain
    assert values("guidance/analytic/unguided/version_0") == plain
    assert results(steered)["source"]["steering"]["guidance"]["class"] == "Guidance"
    override = ["--steering.guidance.init_args.strength", "1e-9"]
    command("evaluate", "guidance/analytic/unguided", *option, *override)
    assert values(steered) == pytest.approx(plain, rel=1e-4)  # and nothing of the run before it


def test_samples_of_a_steered_run_are_drawn_and_kept_apart(here: Path) -> None:
    unguided = ["guidance/analytic/unguided", "--steps", "4", "--count", "16"]
    command("sample", *unguided)
    command("sample", *unguided, "--steering", "guidance/analytic/polyak")
    (plain,), (steered,) = (
        list((Path("runs/guidance/analytic") / name / "version_0/samples").glob("*.png"))
        for name in ("unguided", "unguided+polyak")
    )
    assert plain.read_bytes() != steered.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steering.guidance.class_path", "fewstep.guidance.polyac"], "no attribute 'polyac'"),
        (["--steering", "guidance/analytic/polyac"], "Did you mean 'guidance/analytic/polyak'"),
        (["--steering", "analytic/lcm"], "has no model.init_args.steering"),
        (["--steering", "guidance/analytic/polyak", "--steering.targt", "x"], "targt"),
    ],
)
def test_mistakes_are_named(here: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        command("evaluate", "guidance/analytic/unguided", "--steps", "4", *arguments)


def test_training_a_method_that_trains_nothing_is_refused(here: Path) -> None:
    with pytest.raises(FewstepError, match="trains nothing, but trainer"):
        command("fit", "guidance/analytic/dps", "--trainer.max_steps", "5")


def test_steering_another_pipeline_is_refused(here: Path) -> None:
    option = ["--steering", "guidance/analytic/polyak", "--samples", "somewhere"]
    with pytest.raises(FewstepError, match="--steering guides the experiment's own networks"):
        command("evaluate", "guidance/analytic/unguided", *option)


def accuracy(judge: str, guide: str = "tuner") -> dict[str, Any]:
    reader = "fewstep.metrics.digit_reader"
    pair = {
        name: {"class_path": reader, "init_args": {"part": part}}
        for name, part in (("guide", guide), ("judge", judge))
    }
    features = {"class_path": "fewstep.metrics.GuideAndJudge", "init_args": pair}
    return {"class_path": "fewstep.metrics.ClassAccuracy", "init_args": {"features": features}}


def guide_distance() -> dict[str, Any]:
    reader = {"class_path": "fewstep.metrics.digit_reader", "init_args": {"part": "guide"}}
    energy = {"class_path": "fewstep.guidance.ClassLabel", "init_args": {"classifier": reader}}
    return {"class_path": "fewstep.guidance.GuidanceDistance", "init_args": {"energy": energy}}


DIT = {
    "class_path": "fewstep.networks.DiT",
    "init_args": {"sample_size": 8, "channels": 1, "num_layers": 1, "num_heads": 2, "head_dim": 8},
}
START = {
    "class_path": "fewstep.diffusion.Denoiser",
    "init_args": {
        "backbone": DIT,
        "schedule": {"class_path": "fewstep.diffusion.VPSchedule"},
        "prediction_type": "v_prediction",
    },
}


@pytest.mark.slow
def test_the_guide_is_not_taken_for_a_judge(here: Path) -> None:
    small(here / "small.yaml", [accuracy("guide")])
    start = ["--model.init_args.start", json.dumps(START)]
    with pytest.raises(FewstepError, match="would judge samples by the Perceptron that guides"):
        command("fit", "guidance/digits/dps", *start)


@pytest.mark.slow
def test_the_guide_that_is_measured_has_to_be_the_one_that_guided(here: Path) -> None:
    small(here / "small.yaml", [accuracy("judge")])
    start = ["--model.init_args.start", json.dumps(START)]
    with pytest.raises(FewstepError, match="takes a Perceptron for the guide"):
        command("fit", "guidance/digits/dps", *start)


def test_an_experiments_steering_is_merged_from_its_files() -> None:
    expanded, name = expand_steering(["evaluate", "--steering", "guidance/digits/mpgd", "--x", "1"])
    assert (name, expanded[0], expanded[2:]) == ("mpgd", "evaluate", ["--x", "1"])
    steering = json.loads(expanded[1].removeprefix("--steering="))
    assert steering["guidance"]["class_path"] == "fewstep.guidance.mpgd"
    inline, name = expand_steering(["--steering", '{"target": null}'])
    assert (inline, name) == (['--steering={"target": null}'], "steered")


@pytest.mark.slow
def test_digits_are_planned_measured_and_steered_as_their_experiments_say(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an untrained network: what is looked at is the way, not the digits at its end."""
    few = {"trainer": {"accelerator": "cpu"}, "model": {"init_args": {"step_counts": [2]}}}
    (here / "small.yaml").write_text(yaml.safe_dump(few))
    start = ["--model.init_args.start", json.dumps(START)]
    run(["plan", "-c", "guidance/digits/few_polyak", "-c", "small.yaml", *start])
    assert "student" in capsys.readouterr().out
    command("fit", "guidance/digits/few_polyak", *start)
    name = "guidance/digits/few_polyak/version_0"
    folder = Path("runs") / name
    found = {m["metric"]: m for m in results(name)["measurements"]}
    assert {"guide_accuracy", "judge_accuracy", "guide_judge_gap"} <= set(found)
    assert {"frechet_digit_classifier", "nearest_data_ratio"} <= set(found)
    cost = found["guide_accuracy"]["cost"]
    assert (cost["denoiser_evaluations"], cost["denoiser_gradients"]) == (2 * 5, 2 * 4)
    assert cost["seconds"] > 0
    assert found["guide_accuracy"]["value"] > 0.3  # 0.1 is chance
    with (folder / "guidance.csv").open() as file:
        assert {row["samples"] for row in csv.DictReader(file)} == {"512"}
    option = ["--steps", "2", "--steering", "guidance/digits/few_polyak"]
    command("evaluate", "guidance/digits/few_unguided", *start, *option)
    steered = "guidance/digits/few_unguided+few_polyak/version_0"
    assert values(steered) == values(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "costs", "rows"),
    [("few_best_of", (2 * 8, 0, 8), 0), ("few_noise", (2 * 21, 2 * 20, 21), 20)],
)
def test_candidates_and_noise_are_chosen_as_their_experiments_say(
    here: Path, name: str, costs: tuple[int, int, int], rows: int
) -> None:
    small(here / "small.yaml", [accuracy("judge", "guide")])
    start = ["--model.init_args.start", json.dumps(START), "--model.init_args.step_counts", "[2]"]
    command("fit", f"guidance/digits/{name}", *start)
    run_folder = f"guidance/digits/{name}/version_0"
    found = {m["metric"]: m for m in results(run_folder)["measurements"]}
    counted = found["guide_accuracy"]["cost"]
    known = "denoiser_evaluations", "denoiser_gradients", "energy_evaluations"
    assert tuple(counted[cost] for cost in known) == costs
    assert found["guide_accuracy"]["network_evaluations"] == costs[0]
    assert found["guide_accuracy"]["value"] > 0.2  # 0.1 is chance
    steering = results(run_folder)["source"]["steering"]
    assert steering["candidates"] == (8 if name == "few_best_of" else 1)
    table = Path("runs") / run_folder / "guidance.csv"
    lines = table.read_text().splitlines()[1:] if table.exists() else []
    assert len(lines) == rows


@pytest.mark.slow
def test_candidates_are_an_option_of_any_steering(here: Path) -> None:
    """What steers can also choose: the guide is surer of the best of several guided samples."""
    small(here / "small.yaml", [guide_distance()])
    start = ["--model.init_args.start", json.dumps(START), "--steps", "2"]
    option = ["--steering", "guidance/digits/few_dps"]
    command("evaluate", "guidance/digits/few_unguided", *start, *option)
    name = "guidance/digits/few_unguided+few_dps/version_0"
    alone = results(name)["measurements"][0]
    command(
        "evaluate", "guidance/digits/few_unguided", *start, *option, "--steering.candidates", "3"
    )
    (best,) = results(name)["measurements"]
    assert best["metric"] == "guidance_distance"
    assert best["value"] < alone["value"]
    assert best["network_evaluations"] == 3 * alone["network_evaluations"]


CLIPS = {
    "data": {"init_args": {"num_clips": 48, "num_held_out": 16}},
    "model": {
        "init_args": {
            "start": {
                "class_path": "fewstep.diffusion.Denoiser",
                "init_args": {
                    "backbone": {
                        "class_path": "fewstep.networks.VideoDiT",
                        "init_args": {
                            "sample_size": 16,
                            "num_frames": 8,
                            "channels": 1,
                            "patch_size": 4,
                            "patch_frames": 4,
                            "num_layers": 1,
                        },
                    },
                    "schedule": {"class_path": "fewstep.diffusion.VPSchedule"},
                    "prediction_type": "v_prediction",
                },
            },
            "step_counts": [3],
        }
    },
}


def test_clips_are_steered_to_where_the_data_end(here: Path) -> None:
    """The network is told no place, which it could not take; its samples end there all the same."""
    small(here / "small.yaml", [{"class_path": "fewstep.metrics.EndError"}])
    Path("clips.yaml").write_text(yaml.safe_dump(CLIPS))
    errors = {}
    for name in ("few_unguided", "few_polyak", "few_clear"):
        command("fit", f"guidance/moving_digits/{name}", "-c", "clips.yaml")
        found = results(f"guidance/moving_digits/{name}/version_0")["measurements"]
        errors[name] = {one["metric"]: one["value"] for one in found}["end_error"]
    assert errors["few_polyak"] < 0.7 * errors["few_unguided"]
    assert errors["few_clear"] < 0.9 * errors["few_unguided"]  # a sum, of which one part is told

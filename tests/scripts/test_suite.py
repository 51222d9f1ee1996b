"""``fewstep suite``: what a suite file means, and what is left of it to do."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.errors import FewstepError
from scripts.experiments import experiments_roots, find_experiment, known_experiments
from scripts.main import main, run
from scripts.suite import variants
from scripts.suite.files import find_suite, read_suite
from scripts.suite.plan import refuse_changed
from scripts.suite.variants import variants_of

from suites import HOME, finish, plan, states, train, write_suite

STUDENT = {"experiment": "digits/lcm", "after": "teacher"}
LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture(scope="module", autouse=True)
def _each_configuration_is_parsed_once() -> Iterator[None]:
    parse = variants.parse

    @functools.cache
    def parsed(experiment: str, settings: str) -> dict[str, Any]:
        return parse(experiment, json.loads(settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "parse", lambda e, s: copy.deepcopy(parsed(e, json.dumps(dict(s)))))
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/nowhere")
    return tmp_path


def value(config: dict[str, Any], key: str) -> Any:
    """A dotted key's value."""
    return functools.reduce(lambda found, part: found[part], key.split("."), config)


# ---------------------------------------------------------------------- the file


def test_a_suite_is_every_entry_with_every_seed_and_students_learn_from_their_seeds_teacher() -> (
    None
):
    # The student stands first; its teacher is run first all the same.
    write_suite(seeds=[0, 3], experiments=[STUDENT, "digits/teacher"])
    found = plan()
    assert [cell.folder for cell in found.cells] == [
        HOME / label / f"seed_{seed}" for label in ("teacher", "lcm") for seed in (0, 3)
    ]
    configs = [cell.asked.config for cell in found.cells]
    assert [config["seed_everything"] for config in configs] == [0, 3, 0, 3]
    assert [config["run"]["version"] for config in configs] == ["seed_0", "seed_3"] * 2
    teachers = [config["model"]["init_args"].get("teacher") for config in configs]
    assert teachers == [None, None, "runs/x/teacher/seed_0", "runs/x/teacher/seed_3"]
    assert not HOME.exists(), "a plan changes nothing"


def test_a_grid_is_the_product_of_its_values_and_goes_before_what_is_set() -> None:
    write_suite(
        set={"model.init_args.ema_decay": 0.5},
        experiments=[
            {
                "experiment": "digits/teacher",
                "set": {"trainer.max_steps": 7},
                "grid": {"model.init_args.ema_decay": [0.8, 0.9], LR: [0.1, 0.2]},
            }
        ],
    )
    found = {cell.variant.label: cell.asked.config for cell in plan().cells}
    assert list(found) == [
        f"teacher,ema_decay={decay},lr={lr}" for decay in (0.8, 0.9) for lr in (0.1, 0.2)
    ]
    last = found["teacher,ema_decay=0.9,lr=0.2"]
    assert (value(last, "model.init_args.ema_decay"), value(last, LR)) == (0.9, 0.2)
    assert last["trainer"]["max_steps"] == 7


def test_keys_with_a_comma_between_them_change_together_and_the_first_names_the_run() -> None:
    layers, updates = "model.init_args.backbone.init_args.num_layers", "trainer.max_steps"
    write_suite(
        experiments=[
            {"experiment": "digits/rdm", "grid": {f"{layers}, {updates}": [[2, 60], [4, 30]]}}
        ]
    )
    found = {cell.variant.label: cell.asked.config for cell in plan().cells}
    assert {k: (value(c, layers), value(c, updates)) for k, c in found.items()} == {
        "rdm,num_layers=2": (2, 60),
        "rdm,num_layers=4": (4, 30),
    }


@pytest.mark.parametrize("point", [[2], [2, 60, 1], 2])
def test_keys_that_change_together_need_a_value_each(point: Any) -> None:
    write_suite(experiments=[{"experiment": "digits/rdm", "grid": {"a.b, c.d": [[1, 2], point]}}])
    with pytest.raises(FewstepError, match=r"2 keys together.*no list of 2 values"):
        read_suite(Path("x.yaml"))


def test_with_a_grid_for_all_each_student_has_the_teacher_of_its_point() -> None:
    write_suite(
        grid={"data.init_args.batch_size": [8, 16]}, experiments=["digits/teacher", STUDENT]
    )
    found = variants_of(read_suite(Path("x.yaml")))
    parents = {v.label: [p.label for p in v.parents.values()] for v in found if v.parents}
    assert parents == {
        "lcm,batch_size=8": ["teacher,batch_size=8"],
        "lcm,batch_size=16": ["teacher,batch_size=16"],
    }


def test_a_teacher_with_a_single_seed_serves_students_of_all_seeds() -> None:
    teacher = {"experiment": "digits/teacher", "seeds": [5]}
    write_suite(seeds=[0, 1], experiments=[teacher, STUDENT])
    found = plan()
    assert [[p.folder.name for p in cell.parents] for cell in found.cells[1:]] == [["seed_5"]] * 2
    suite = read_suite(Path("x.yaml"), seeds=[9])
    assert [entry.seeds for entry in suite.entries] == [(5,), (9,)]


@pytest.mark.slow
def test_steps_are_measured_where_the_method_serves_them() -> None:
    write_suite(
        steps=[2, 4],
        experiments=[
            "digits/teacher",
            STUDENT,
            {**STUDENT, "experiment": "digits/pcm_4"},
            {**STUDENT, "experiment": "digits/pcm_8"},
            {**STUDENT, "label": "one", "steps": [1]},
            {**STUDENT, "experiment": "digits/pcm_1"},
            {**STUDENT, "experiment": "digits/pcm_1", "label": "renoised", "steps": [1, 2]},
        ],
    )
    key = "model.init_args.step_counts"
    found = {cell.variant.label: value(cell.asked.config, key) for cell in plan().cells}
    students = {"lcm": [2, 4], "pcm_4": [4], "pcm_8": None, "one": [1]}
    assert found == {"teacher": [2, 4], **students, "pcm_1": None, "renoised": [1, 2]}


def test_callbacks_are_set_by_their_names_and_the_others_stay() -> None:
    write_suite(
        set={
            "trainer.callbacks.Evaluation.num_samples": 99,
            "trainer.callbacks.Checkpoints.keep": 1,
        },
        experiments=["digits/teacher"],
    )
    callbacks = plan().cells[0].asked.config["trainer"]["callbacks"]
    options = {c["class_path"].split(".")[-1]: c["init_args"] for c in callbacks}
    assert options["Evaluation"]["num_samples"] == 99
    assert options["Evaluation"]["metrics"][0]["class_path"] == "fewstep.metrics.FrechetDistance"
    assert (options["Checkpoints"]["keep"], options["Checkpoints"]["every_n_updates"]) == (1, 250)
    assert {"Samples", "Throughput"} <= set(options)


TEACHER = {"experiment": "digits/teacher"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"experiment": [TEACHER]}, "unknown key 'experiment'. Did you mean 'experiments'?"),
        ({"experiments": [{**TEACHER, "ste": {}}]}, "entry 1 has an unknown key 'ste'. Did you"),
        ({"experiments": ["digits/techer"]}, "Did you mean 'digits/teacher'?"),
        (
            {"experiments": [{**TEACHER, "set": {"trainer.max_stps": 1}}]},
            "Entry 'teacher': The configuration has an unknown key 'trainer.max_stps'. Did you "
            "mean 'trainer.max_steps'?",
        ),
        (
            {"experiments": [{**TEACHER, "grid": {"model.init_args.ema_decai": [1]}}]},
            "Did you mean 'ema_decay'?",
        ),
        (
            {"experiments": [{**TEACHER, "set": {"trainer.callbacks.Evalution.seeds": [1]}}]},
            "sets no callback of this experiment. Did you mean 'Evaluation'?",
        ),
        (
            {"experiments": [{**TEACHER, "set": {"trainer.callbacks.Evaluation.sedes": [1]}}]},
            "unknown key 'sedes' for callbacks.Evaluation",
        ),
        ({"experiments": [{**TEACHER, "set": {"trainer.callbacks": []}}]}, "no callbacks.Evaluat"),
        ({"experiments": [{**TEACHER, "set": {"trainer.max_steps": -1}}]}, "it would never end"),
        ({"experiments": [{**TEACHER, "set": {"seed_everything": 1}}]}, "a suite has `seeds`"),
        ({"experiments": [{**TEACHER, "set": {"run.name": "x"}}]}, "a suite has `name` and `lab"),
        ({"experiments": [{**TEACHER, "grid": {"trainer.max_steps": 4}}]}, "no list of values"),
        ({"experiments": [TEACHER, TEACHER]}, "two entries 'teacher'"),
        ({"experiments": [TEACHER, {**STUDENT, "after": "techer"}]}, "Did you mean 'teacher'?"),
        (
            {"experiments": [{**TEACHER, "after": "lcm"}, STUDENT]},
            "come `after` one another: teacher, lcm",
        ),
        (
            {
                "experiments": [
                    {**TEACHER, "grid": {"model.init_args.ema_decay": [0.1, 0.2]}},
                    STUDENT,
                ]
            },
            "'lcm' comes after 'teacher', which is 2 runs a seed: teacher,ema_decay=0.1, teacher,",
        ),
        (
            {"experiments": [{**TEACHER, "seeds": [0, 1]}, {**STUDENT, "seeds": [1, 2]}]},
            "'lcm' has seed 2, but 'teacher', which it needs, has only 0, 1",
        ),
        ({"experiments": [{**TEACHER, "label": "a/b"}]}, "is 'a/b', but it names a folder"),
        ({"experiments": [TEACHER], "seeds": [0, 0]}, "no list of different whole numbers"),
        ({"experiments": [TEACHER], "seeds": 3}, "`seeds` is no list of different whole numbers"),
        (
            {"experiments": [TEACHER, {**STUDENT, "experiment": "digits/pcm_4", "steps": [2]}]},
            "steps [2]: this student serves 4",
        ),
        ({"experiments": []}, "has no list of `experiments`"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(
    content: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(**content)
    assert main(["suite", "x.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_suites_are_found_by_short_names_and_are_no_experiments() -> None:
    assert find_suite("digits").parts[-2:] == ("suites", "digits.yaml")
    with pytest.raises(FewstepError, match="Did you mean 'digits'"):
        find_suite("digit")
    assert not [name for name in known_experiments() if name.startswith("suites")]


SUITES = sorted(path.stem for path in (experiments_roots()[-1] / "suites").glob("*.yaml"))


@pytest.mark.parametrize("name", SUITES)
def test_the_suites_that_come_with_fewstep_are_whole(name: str) -> None:
    suite = read_suite(find_suite(name))
    assert len(variants_of(suite)) > 1
    assert all(find_experiment(entry.experiment) for entry in suite.entries)


# ---------------------------------------------------------------------- what is left to do


@pytest.fixture
def two() -> None:
    """A teacher and its student."""
    write_suite(experiments=["digits/teacher", STUDENT])


@pytest.mark.usefixtures("two")
def test_runs_are_done_partly_done_unmeasured_or_to_do() -> None:
    teacher, student = plan().cells
    assert states(plan()) == {"teacher, seed 0": "to do", "lcm, seed 0": "to do"}
    train(teacher, update=10)
    assert states(plan())["teacher, seed 0"] == "partly"
    assert plan().cells[0].standing.detail == "at update 10 of 3000"
    train(teacher)
    assert states(plan())["teacher, seed 0"] == "to measure"
    finish(teacher)
    train(student, update=20)
    assert states(plan()) == {"teacher, seed 0": "done", "lcm, seed 0": "partly"}
    assert [cell.name for cell in plan().open] == ["lcm, seed 0"]


@pytest.mark.usefixtures("two")
def test_results_of_fewer_updates_are_not_the_runs() -> None:
    teacher = plan().cells[0]
    finish(teacher)
    results = teacher.folder / "results.json"
    results.write_text(
        results.read_text().replace('"student_updates": 3000', '"student_updates": 9')
    )
    assert states(plan())["teacher, seed 0"] == "to measure"


@pytest.mark.usefixtures("two")
def test_a_run_that_left_with_an_error_has_failed_and_is_tried_again() -> None:
    teacher = plan().cells[0]
    train(teacher, update=10)
    ended = teacher.folder / "local" / "exit"
    ended.write_text("1\n")
    assert plan().cells[0].standing.detail == "status 1, at update 10 of 3000"
    assert states(plan())["teacher, seed 0"] == "failed"
    assert plan().open[0].name == "teacher, seed 0"
    ended.write_text("75\n")  # saved when it was asked to
    assert states(plan())["teacher, seed 0"] == "partly"
    finish(teacher)
    ended.write_text("1\n")  # on its way out, all done
    assert states(plan())["teacher, seed 0"] == "done"


@pytest.mark.usefixtures("two")
def test_a_run_from_before_there_was_an_option_is_the_run_with_its_default() -> None:
    for cell in plan().cells:
        finish(cell)
    path = plan().cells[0].folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for option in ("sampler", "clip_from"):  # the method's own, and one of a class it derives from
        del config["model"]["init_args"][option]
    path.write_text(yaml.safe_dump(config))
    assert states(plan())["teacher, seed 0"] == "done"
    write_suite(experiments=[{**TEACHER, "set": {"model.init_args.clip_from": 7}}, STUDENT])
    assert states(plan())["teacher, seed 0"] == "changed"


@pytest.mark.usefixtures("two")
def test_a_changed_configuration_is_refused_until_it_is_run_afresh_with_what_hangs_on_it() -> None:
    for cell in plan().cells:
        finish(cell)
    write_suite(experiments=[{**TEACHER, "set": {"data.init_args.batch_size": 8}}, STUDENT])
    found = plan()
    assert states(found) == {"teacher, seed 0": "changed", "lcm, seed 0": "done"}
    with pytest.raises(FewstepError, match=r"teacher/seed_0: data\.init_args\.batch_size 128 → 8"):
        refuse_changed(found)
    anew = plan(fresh=True)
    assert [cell.folder.name for cell in anew.cells] == ["seed_0_version_1"] * 2
    assert len(anew.open) == 2
    assert anew.cells[1].asked.config["model"]["init_args"]["teacher"].endswith("seed_0_version_1")

    for cell in anew.cells:
        finish(cell)
    assert set(states(plan()).values()) == {"done"}
    assert plan(fresh=True).cells[0].folder.name == "seed_0_version_1", "nothing has changed since"
    write_suite(experiments=["digits/teacher", STUDENT])
    assert [cell.folder.name for cell in plan().cells] == ["seed_0"] * 2, "as it was before"


@pytest.mark.usefixtures("two")
def test_a_student_whose_teacher_is_lost_is_not_taken_for_the_next_teachers() -> None:
    teacher, student = plan().cells
    finish(teacher)
    finish(student)
    (teacher.folder / "config.yaml").unlink()
    (teacher.folder / "checkpoints" / "last.ckpt").unlink()
    (teacher.folder / "checkpoints" / "update_00003000.ckpt").unlink()
    assert states(plan()) == {"teacher, seed 0": "to do", "lcm, seed 0": "changed"}


@pytest.mark.usefixtures("two")
def test_another_protocol_asks_for_measuring_alone_and_sets_the_old_numbers_aside() -> None:
    finish(plan().cells[0])
    more = {"trainer.callbacks.Evaluation.num_samples": 4096}
    write_suite(experiments=[{**TEACHER, "set": more, "steps": [1, 2]}])
    (cell,) = plan().cells
    assert cell.standing.state == "to measure"
    assert "num_samples 2048 → 4096" in cell.standing.detail
    cell.prepare("local")
    assert not (cell.folder / "results.json").exists()
    assert (cell.folder / "results.json.before").exists()
    assert plan().cells[0].standing.detail == "trained"


@pytest.mark.usefixtures("two")
def test_where_it_runs_makes_no_other_run_unless_the_suite_says_where() -> None:
    teacher, student = plan().cells
    finish(teacher)
    finish(student)
    for cell in (teacher, student):
        path = cell.folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["trainer"].update(devices=8, num_nodes=2, accelerator="cpu")
        config["run"]["dir"] = "/elsewhere/x"
        if cell is student:
            config["model"]["init_args"]["teacher"] = "/elsewhere/x/teacher/seed_0"
        path.write_text(yaml.safe_dump(config))
    assert set(states(plan()).values()) == {"done"}
    write_suite(experiments=[{**TEACHER, "set": {"trainer.devices": 4}}])
    assert plan().cells[0].standing.detail == "trainer.devices 8 → 4"


@pytest.mark.usefixtures("two")
def test_only_chooses_labels_and_what_they_need() -> None:
    write_suite(
        seeds=[0, 1],
        experiments=[TEACHER, STUDENT, {**STUDENT, "experiment": "digits/pcm_4"}],
    )
    finish(plan().cells[0])
    assert [cell.name for cell in plan("pcm_*").open] == [
        "teacher, seed 1",
        "pcm_4, seed 0",
        "pcm_4, seed 1",
    ]
    with pytest.raises(FewstepError, match=r"--only pcm_3 chooses no entry\. Did you mean 'pcm_4'"):
        plan("pcm_3")


def test_only_chooses_a_point_of_a_grid_or_the_whole_of_it() -> None:
    write_suite(seeds=[0], experiments=[TEACHER, {**STUDENT, "grid": {LR: [0.1, 0.2]}}])
    finish(plan().cells[0])
    assert [cell.variant.label for cell in plan("lcm").open] == ["lcm,lr=0.1", "lcm,lr=0.2"]
    assert [cell.variant.label for cell in plan("l?m,*2").open] == ["lcm,lr=0.2"]


@pytest.mark.usefixtures("two")
def test_a_dry_run_shows_the_plan_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(["suite", "x.yaml", "--seeds", "4", "--dry-run"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["task", "run", "seed", "updates", "state"],
        ["0", "teacher", "4", "3,000", "to", "do"],
        ["1", "lcm", "4", "500", "to", "do"],
    ]
    assert not Path("runs").exists()

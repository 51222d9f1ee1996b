"""The demos: a teacher on data that need no download, its few-step students, and their report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from callbacks.results import FILE_NAME, read_results
from scripts.cli import run_command
from scripts.contact_sheet import contact_sheet, newest_picture
from scripts.experiments import find_experiment, with_defaults
from scripts.report import build_report
from scripts.suite.summary import summary
from scripts.trainer_options import check_seeds


@dataclass(frozen=True)
class Demo:
    """What a demo trains and shows.

    Attributes:
        title: of its report.
        folder: of its runs, unless told otherwise.
        teacher, students: experiments, in the order in which they are trained.
        shown: caption, experiment and sampling steps of each picture on the contact sheet.
        columns: pictures a row there.
    """

    title: str
    folder: str
    teacher: str
    students: tuple[str, ...]
    shown: tuple[tuple[str, str, int], ...]
    columns: int


def _each(caption: str, experiment: str, counts: Sequence[int]) -> tuple[tuple[str, str, int], ...]:
    return tuple(
        (f"{caption}, {count} step{'s' * (count > 1)}", experiment, count) for count in counts
    )


DEMOS = {
    "digits": Demo(
        "Few-step digits",
        "runs/demo",
        "digits/teacher",
        ("digits/lcm", *(f"digits/pcm_{n}" for n in (8, 4, 2)), "digits/pcm_1_adversarial"),
        (
            *_each("teacher (DDIM)", "digits/teacher", (1, 2, 4, 8, 50)),
            *_each("LCM", "digits/lcm", (1, 2, 4, 8)),
            *_each("adversarial PCM", "digits/pcm_1_adversarial", (1,)),
            *(shown for n in (2, 4, 8) for shown in _each("PCM", f"digits/pcm_{n}", (n,))),
        ),
        columns=5,
    ),
    "moving_digits": Demo(
        "Few-step moving digits",
        "runs/demo_video",
        "moving_digits/teacher",
        ("moving_digits/lcm", "moving_digits/mcm"),
        (
            *_each("teacher (DDIM)", "moving_digits/teacher", (50,)),
            *_each("teacher (DDIM)", "moving_digits/teacher", (4,)),
            *(
                shown
                for n in (1, 2, 4)
                for shown in (
                    *_each("LCM", "moving_digits/lcm", (n,)),
                    *_each("MCM", "moving_digits/mcm", (n,)),
                )
            ),
        ),
        columns=2,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One training run of a demo."""

    experiment: str
    seed: int
    folder: Path

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / self.experiment / f"version_{self.seed}"

    def max_steps(self) -> int:
        """How many student updates the experiment asks for."""
        steps = 0
        for file in with_defaults(find_experiment(self.experiment)):
            trainer = yaml.safe_load(file.read_text()).get("trainer", {})
            steps = trainer.get("max_steps", steps)
        return int(steps)

    def finished(self) -> bool:
        """Whether the run has been trained to its end and measured."""
        results = self.run / FILE_NAME
        return results.exists() and read_results(results)["student_updates"] == self.max_steps()

    def arguments(self, teacher: str) -> list[str]:
        """The command that runs, or resumes, this stage."""
        arguments = ["fit", "-c", self.experiment, "--seed_everything", str(self.seed)]
        arguments += ["--run.dir", str(self.folder), "--run.version", self.run.name]
        arguments += ["--ckpt_path", "last"]
        if self.experiment != teacher:
            run = Stage(teacher, self.seed, self.folder).run
            arguments += ["--model.init_args.teacher", str(run)]
        return arguments


def main(arguments: list[str]) -> None:
    """Runs ``fewstep demo``."""
    parser = argparse.ArgumentParser(
        prog="fewstep demo",
        description=__doc__,
        epilog="Interrupt it whenever you like: the same command goes on where it was.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        default="digits",
        choices=DEMOS,
        help="digits: pictures, LCM and PCM. moving_digits: videos, LCM and MCM "
        "(default: %(default)s)",
    )
    parser.add_argument("--dir", type=Path, help="folder of its runs (default: runs/demo...)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="training seeds; each repeats all runs"
    )
    options = parser.parse_args(arguments)
    check_seeds("--seeds", options.seeds)
    demo = DEMOS[options.name]
    run_demo(demo, options.dir or Path(demo.folder), options.seeds)


def run_demo(demo: Demo, folder: Path, seeds: Sequence[int]) -> None:
    """Trains what is not trained yet; writes tables, contact sheet and report."""
    stages = [
        Stage(experiment, seed, folder)
        for seed in seeds
        for experiment in (demo.teacher, *demo.students)
    ]
    started = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.experiment}, seed {stage.seed}"
        if stage.finished():
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}: {stage.max_steps()} updates", flush=True)
        run_command(stage.arguments(demo.teacher))
    runs: dict[str, list[Path]] = {}
    for stage in stages:
        runs.setdefault(stage.experiment, []).append(stage.run)
    table = summary(runs)
    (folder / "summary.md").write_text(table)
    pictures = [
        (caption, newest_picture(Stage(experiment, seeds[0], folder).run, "ema", count))
        for caption, experiment, count in demo.shown
    ]
    sheet = contact_sheet(pictures, folder / "samples.png", demo.columns)
    report = build_report([stage.run for stage in stages], folder / "report.html", demo.title)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table}\nSamples: {sheet}\nReport:  {report}   ({minutes:.1f} minutes)")

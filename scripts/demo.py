"""The demo: a teacher on real handwritten digits, its few-step students, and their report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from callbacks.results import FILE_NAME, read_results
from fewstep.errors import FewstepError
from scripts.cli import run_command
from scripts.contact_sheet import contact_sheet, newest_picture
from scripts.experiments import find_experiment, with_defaults
from scripts.report import build_report
from scripts.suite.summary import markdown

TEACHER = "digits/teacher"
STUDENTS = (
    "digits/lcm",
    "digits/pcm_8",
    "digits/pcm_4",
    "digits/pcm_2",
    "digits/pcm_1_adversarial",
)
TEACHER_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """One training run of the demo."""

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

    def arguments(self) -> list[str]:
        """The command that runs, or resumes, this stage."""
        arguments = ["fit", "-c", self.experiment, "--seed_everything", str(self.seed)]
        arguments += ["--run.dir", str(self.folder), "--run.version", self.run.name]
        arguments += ["--ckpt_path", "last"]
        if self.experiment != TEACHER:
            teacher = Stage(TEACHER, self.seed, self.folder).run
            arguments += ["--model.init_args.teacher", str(teacher)]
        return arguments


def main(arguments: list[str]) -> None:
    """Runs ``fewstep demo``."""
    parser = argparse.ArgumentParser(
        prog="fewstep demo",
        description=__doc__,
        epilog="Interrupt it whenever you like: the same command goes on where it was.",
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="folder of its runs")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="training seeds; each repeats all runs"
    )
    options = parser.parse_args(arguments)
    stages = [
        Stage(experiment, seed, options.dir)
        for seed in options.seeds
        for experiment in (TEACHER, *STUDENTS)
    ]
    started = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.experiment}, seed {stage.seed}"
        if stage.finished():
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}: {stage.max_steps()} updates", flush=True)
        run_command(stage.arguments())
    table = summary(options.dir, options.seeds)
    (options.dir / "summary.md").write_text(table)
    sheet = contact_sheet(
        sample_pictures(options.dir, options.seeds[0]), options.dir / "samples.png"
    )
    report = build_report(
        [stage.run for stage in stages], options.dir / "report.html", "Few-step digits"
    )
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table}\nSamples: {sheet}\nReport:  {report}   ({minutes:.1f} minutes)")


def sample_pictures(folder: Path, seed: int) -> list[tuple[str, Path]]:
    """Captioned pictures of the teacher and all students, made from the same noise."""
    teacher = Stage(TEACHER, seed, folder).run
    counts = (1, 2, 4, 8, TEACHER_STEPS)
    shown = [(f"teacher, {_steps(n)} of DDIM", newest_picture(teacher, "ema", n)) for n in counts]
    lcm = Stage("digits/lcm", seed, folder).run
    shown += [(f"LCM, {_steps(n)}", newest_picture(lcm, "ema", n)) for n in (1, 2, 4, 8)]
    last = STUDENTS[-1]
    shown.append(
        ("adversarial PCM, 1 step", newest_picture(Stage(last, seed, folder).run, "ema", 1))
    )
    for n in (2, 4, 8):
        run = Stage(f"digits/pcm_{n}", seed, folder).run
        shown.append((f"PCM, {_steps(n)}", newest_picture(run, "ema", n)))
    return shown


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def summary(folder: Path, seeds: Sequence[int]) -> str:
    """The distances of every run as a Markdown table, mean and spread over training seeds."""
    rows: dict[str, dict[int, list[float]]] = {}
    metric = ""
    for experiment in (TEACHER, *STUDENTS):
        for seed in seeds:
            results = read_results(Stage(experiment, seed, folder).run / FILE_NAME)
            for entry in results["measurements"]:
                metric = entry["metric"]
                cells = rows.setdefault(experiment, {})
                cells.setdefault(entry["num_steps"], []).append(entry["value"])
    if not rows:
        raise FewstepError(f"There are no results below '{folder}'.")
    heading = f"`{metric}` (lower is better) by sampling steps, {len(seeds)} training seed(s)"
    return f"{heading}\n\n{markdown(rows)}"

"""The options of ``fewstep suite``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from scripts.slurm.options import Options as ClusterOptions
from scripts.slurm.options import Parser, add_resources, one_line, whole

EPILOG = """\
A suite is a YAML file; `fewstep suite NAME` finds experiments/suites/NAME.yaml too:

  name: digits
  seeds: [0, 1, 2]
  experiments:
    - digits/teacher
    - {experiment: digits/lcm, after: teacher}
    - {experiment: digits/pcm_4, after: teacher, grid: {model.init_args.ema_decay: [0.95, 0.98]}}

Keys of a grid with a comma between them change together, each value being a list of theirs:
{"model.init_args.ema_decay, trainer.max_steps": [[0.9, 80], [0.95, 160]]}. Where a grid goes
through numbers, a table and a picture of all measurements against them come with the report.

The same command goes on after any interruption: what is done is skipped, what was cut short is
resumed, what failed is tried again.

  fewstep suite digits --dry-run
  fewstep suite digits --only 'pcm_*' --seeds 0
  fewstep suite digits --submit --partition gpu --gpus-per-node 8 --time 4:00:00
"""


@dataclass(frozen=True)
class Options:
    """What was asked of the suite."""

    suite: str | None
    runs: Path | None
    only: list[str] | None
    seeds: list[int] | None
    dry_run: bool
    stop_on_failure: bool
    fresh: bool
    report_only: bool
    task: str | None
    submit: bool
    at_once: int | None


def parser() -> Parser:
    """The parser of ``fewstep suite``."""
    made = Parser(
        prog="fewstep suite",
        usage="fewstep suite SUITE [options]",
        description="Run a matrix of experiments and seeds, here or on a SLURM cluster, skip what "
        "is done, and end in the report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("suite", nargs="?", metavar="SUITE", help="a suite file, or its short name")
    made.add_argument("--runs", type=Path, metavar="FOLDER", help="its runs; runs/NAME by default")
    made.add_argument("--only", nargs="+", metavar="GLOB",
        help="these labels alone, such as 'pcm_*', and what they need")  # fmt: skip
    made.add_argument("--seeds", type=whole(0), nargs="+", metavar="N",
        help="training seeds in place of the suite's")  # fmt: skip
    made.add_argument("--dry-run", action="store_true",
        help="show the plan, with --submit the scripts as well, and change nothing")  # fmt: skip
    made.add_argument("--stop-on-failure", action="store_true", help="run nothing after a failure")
    made.add_argument("--fresh", action="store_true",
        help="run anew, in folders of their own, what was configured otherwise")  # fmt: skip
    made.add_argument("--report-only", action="store_true", help="write the report of what is done")
    made.add_argument("--task", metavar="N",
        help="run one task of the plan in this process, or a submitted run's folder")  # fmt: skip
    cluster = made.add_argument_group("on a SLURM cluster")
    cluster.add_argument("--submit", action="store_true", help="submit instead of running here")
    cluster.add_argument(
        "--at-once", type=whole(1), metavar="K", help="tasks of an array at a time"
    )
    add_resources(cluster)
    cluster.add_argument("--setup", action="append", default=[], metavar="LINE",
        help='shell before training, such as "module load cuda"; repeatable')  # fmt: skip
    cluster.add_argument("--container", type=one_line, metavar="IMAGE",
        help="an image with fewstep in it")  # fmt: skip
    cluster.add_argument("--mount", type=one_line, action="append", default=[], metavar="PATH[:AS]",
        help="a folder that the container sees as well; repeatable")  # fmt: skip
    cluster.add_argument("--template", type=Path, metavar="FILE", help="a batch script of your own")
    return made


def parse_arguments(arguments: list[str]) -> tuple[Options, ClusterOptions]:
    """What was asked of the suite, and of SLURM.

    Raises:
        FewstepError: for options that are unknown or do not go together.
    """
    made = parser()
    found = vars(made.parse_args(arguments))
    options = Options(**{f.name: found[f.name] for f in fields(Options)})
    given = {f.name: found[f.name] for f in fields(ClusterOptions) if f.name in found}
    cluster = ClusterOptions(**given)
    if options.suite is None and (options.task is None or options.task.isdigit()):
        raise FewstepError("Which suite? `fewstep suite SUITE`; `fewstep suite --help` tells more.")
    if not options.submit:
        needless = unneeded(made, given, options)
        if needless:
            raise FewstepError(f"{needless} is for a cluster: add --submit.")
    return options, cluster


def unneeded(made: Parser, given: dict[str, Any], options: Options) -> str | None:
    """An option for SLURM that was given without ``--submit``."""
    if options.at_once is not None:
        return "--at-once"
    wrong = [name for name, value in given.items() if value != made.get_default(name)]
    wrong.remove("dry_run") if "dry_run" in wrong else None
    return f"--{wrong[0].replace('_', '-')}" if wrong else None

"""The options of ``fewstep submit``, and what they are called in a batch script."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, nearest

EPILOG = """\
Whatever else is given goes to `fewstep fit`, and is checked before anything is submitted:

  fewstep submit -c digits/pcm_4 --nodes 2 --gpus-per-node 8 --time 24:00:00 --signal-before 180
  fewstep submit -c digits/pcm_4 --array 4                    # four seeds, each a run of its own
  fewstep submit -c digits/pcm_4 --array rates.txt%2          # one line of fit's options a task
  fewstep submit -c digits/pcm_4 --ckpt_path last             # go on with the newest run
  fewstep submit --status                                     # what became of them

A template is a batch script with {{placeholders}}; scripts/slurm/job.sh is the one used by default.
"""
# What `fewstep fit` takes that has no dot in its name.
FIT_OPTIONS = ("config", "seed_everything", "print_config", "model", "data", "trainer", "run")


@dataclass(frozen=True)
class Options:
    """What to ask SLURM for; the names are those of the command line and of sbatch."""

    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_gpu: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: list[str] = field(default_factory=list)
    signal_before: int = 120
    array: str | None = None
    setup: list[str] = field(default_factory=list)
    container: str | None = None
    mount: list[str] = field(default_factory=list)
    template: Path | None = None
    dry_run: bool = False
    status: Path | None = None
    ckpt_path: str | None = None
    version: str | None = None

    @property
    def tasks_per_node(self) -> int:
        """Ranks a node: one a GPU, or one without any."""
        return max(1, self.gpus_per_node)


def whole(smallest: int) -> Any:
    """An argument type: a whole number that is not less than ``smallest``."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {smallest} on")
        return int(text)

    return number


def one_line(text: str) -> str:
    """An argument type: text that keeps to its line of the script."""
    if not text.strip() or "\n" in text:
        raise argparse.ArgumentTypeError("it must be one line that is not empty")
    return text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are FewstepErrors."""

    def error(self, message: str) -> Any:
        """Raises what is wrong."""
        raise FewstepError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


def parser() -> Parser:
    """The parser of ``fewstep submit``."""
    made = Parser(
        prog="fewstep submit",
        usage="fewstep submit -c EXPERIMENT [options] [options of fewstep fit]",
        description="Train an experiment on a SLURM cluster: checked, submitted, and after "
        "preemption requeued and resumed in the same folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_resources(made.add_argument_group("what to ask SLURM for"))
    job = made.add_argument_group("the job")
    job.add_argument("--array", type=one_line, metavar="N|FILE[%K]", help="N tasks, each another "
        "seed (seed_everything, +1, ...), or one task for each line of fit's options in a file; "
        "every task has a run folder of its own; %%K runs at most K at a time")  # fmt: skip
    job.add_argument("--setup", action="append", default=[], metavar="LINE",
        help='shell before training, such as "module load cuda"; repeatable')  # fmt: skip
    job.add_argument("--container", type=one_line, metavar="IMAGE",
        help="an image with fewstep in it: Apptainer for *.sif, else pyxis")  # fmt: skip
    job.add_argument("--mount", type=one_line, action="append", default=[], metavar="PATH[:AS]",
        help="a folder that the container sees as well, such as that of models, data or caches; "
        "the working folder and that of runs it always sees; repeatable")  # fmt: skip
    job.add_argument("--template", type=Path, metavar="FILE", help="a batch script of your own")
    job.add_argument("--dry-run", action="store_true", help="print the script, change nothing")
    job.add_argument("--status", type=Path, nargs="?", const=Path("runs"), metavar="FOLDER",
        help="tell of the jobs of the runs below FOLDER (runs) instead")  # fmt: skip
    run = made.add_argument_group("where the run starts and is kept")
    run.add_argument("--ckpt_path", help="'last' goes on with the newest run; or a file or run")
    run.add_argument(
        "--run.version", dest="version", help="a run's folder; one that exists goes on"
    )
    return made


def add_resources(group: Any) -> None:
    """Adds the options that become lines of the batch script."""
    number = whole(1)
    group.add_argument("--nodes", type=number, default=1)
    group.add_argument("--gpus-per-node", type=whole(0), default=1, help="ranks a node; 0 is CPU")
    group.add_argument("--cpus-per-gpu", type=number,
        help="processor cores a rank; by default its num_workers and two more")  # fmt: skip
    group.add_argument("--signal-before", type=number, default=120, metavar="SECONDS",
        help="how long before its end a job is told to save (120)")  # fmt: skip
    for name in ("mem", "time", "partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", type=one_line)
    group.add_argument("--sbatch", type=one_line, action="append", default=[], metavar="OPTION",
        help="any other option of sbatch, as in --sbatch=--exclusive; repeatable")  # fmt: skip


def parse_arguments(arguments: list[str]) -> tuple[Options, list[str]]:
    """Divides a command line into ours and what ``fewstep fit`` takes.

    Raises:
        FewstepError: for an option of the wrong kind, or one that neither command has.
    """
    made = parser()
    found, rest = made.parse_known_args(arguments)
    known = [name.removeprefix("--") for name in made._option_string_actions if name[:2] == "--"]
    for token in rest:
        name = token.split("=", 1)[0].removeprefix("--")
        if not token.startswith("--") or "." in name or name in FIT_OPTIONS:
            if name in ("trainer.num_nodes", "trainer.devices"):
                raise FewstepError(
                    f"Leave out --{name}: --nodes and --gpus-per-node say it to SLURM and to fit."
                )
            continue
        raise FewstepError(
            f"There is no option '--{name}'.{nearest(name, [*known, *FIT_OPTIONS])} "
            "`fewstep submit --help` lists them."
        )
    values = {f.name: getattr(found, f.name) for f in fields(Options)}
    return Options(**values), rest


def directives(options: Options, name: str, log: Path, array: str | None) -> list[str]:
    """The ``#SBATCH`` lines.

    Args:
        name: the job's name.
        log: where the batch shell's own output goes; SLURM fills in ``%j``.
        array: the tasks of an array, as sbatch takes them.
    """
    wanted = {
        "job-name": name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_gpu,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "array": array,
        "chdir": Path.cwd(),
        "output": log,
        "signal": f"B:USR1@{options.signal_before}",
        "open-mode": "append",
    }
    lines = [
        f"--{key}={shlex.quote(str(value))}" for key, value in wanted.items() if value is not None
    ]
    return [f"#SBATCH {line}" for line in (*lines, "--requeue", *options.sbatch)]

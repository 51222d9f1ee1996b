"""The front door: ``fewstep COMMAND ...``."""

from __future__ import annotations

import os
import select
import sys
import traceback

HELP = """\
usage: fewstep COMMAND [options]

Turns slow diffusion models into few-step ones, and measures how good they are.

commands that take an experiment (-c digits/pcm_4, or any YAML file; every key can be overridden,
such as --trainer.max_steps 2000; --print_config shows all of them):
  fit        train it
  validate   losses on held-out data, and its metrics
  evaluate   measure a trained model at several step counts, --steps 1 2 4 8
  sample     draw pictures of its samples
  plan       what it will cost: parameters, memory, network evaluations

  submit     train it on a SLURM cluster; --status tells of jobs, --help of the options

other commands:
  suite      a matrix of experiments and seeds, here or on a cluster, that ends in a report
  report     one self-contained HTML page from any set of run folders
  guidance   search: tunes training-free guidance, with equal effort for every method
  export     a student as a plain diffusers pipeline, with the scheduler that fits its training
  gates      learnable gates on residual branches: apply, merge, report, sensitivity, grow, prune
  shards     make, index, encode and check the shards that training data streams from
  demo       a teacher, its few-step students and their report, on this machine

`fewstep COMMAND --help` tells the options of a command.
A message that begins with "error:" says what to mend; FEWSTEP_TRACEBACK=1 shows where it arose.
"""

EXPERIMENT_COMMANDS = ("fit", "validate", "evaluate", "sample", "plan")

# What to say of a command that was interrupted; the others begin anew.
GOES_ON = {
    "fit": " The same command with --ckpt_path last goes on.",
    **dict.fromkeys(("demo", "suite", "guidance"), " The same command goes on."),
}


def run(arguments: list[str]) -> None:
    """Runs one command; mistakes a user can mend are raised as FewstepError.

    Heavy imports wait until the command is known, so that ``--help`` answers at once.
    """
    from fewstep.errors import FewstepError, nearest

    command = arguments[0]
    if command in (*EXPERIMENT_COMMANDS, "submit"):
        refuse_bare_name(arguments)
    if command in EXPERIMENT_COMMANDS:
        from scripts.cli import run_command

        run_command(arguments)
    elif command == "report":
        from scripts.report import main as report

        report(arguments[1:])
    elif command == "export":
        from scripts.export import main as export

        export(arguments[1:])
    elif command == "guidance":
        from scripts.guidance import main as guidance

        guidance(arguments[1:])
    elif command == "gates":
        from scripts.gates import main as gates

        gates(arguments[1:])
    elif command == "shards":
        from scripts.shards import main as shards

        shards(arguments[1:])
    elif command == "submit":
        from scripts.slurm import main as submit

        submit(arguments[1:])
    elif command == "suite":
        from scripts.suite import main as suite

        suite(arguments[1:])
    elif command == "demo":
        from scripts.demo import main as demo

        demo(arguments[1:])
    else:
        known = [*EXPERIMENT_COMMANDS, "report", "guidance", "export", "gates"]
        known += ["shards", "submit", "suite", "demo"]
        raise FewstepError(
            f"There is no command '{command}'.{nearest(command, known)} "
            f"Commands: {', '.join(known)}; `fewstep --help` tells more."
        )


def refuse_bare_name(arguments: list[str]) -> None:
    """Refuses an experiment that stands where no option names it, and none at all.

    Raises:
        FewstepError: for either.
    """
    from fewstep.errors import FewstepError

    command, *rest = arguments
    if not rest and command != "submit":
        raise FewstepError(f"Name an experiment: fewstep {command} -c digits/teacher")
    if rest and not rest[0].startswith("-"):
        raise FewstepError(
            f"'{rest[0]}' belongs to no option. Name an experiment with -c: fewstep {command} -c "
            f"{' '.join(rest)}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``fewstep`` command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    failed = True
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
        else:
            run(arguments)
        sys.stdout.flush()
        failed = False
    except KeyboardInterrupt:
        print(f"\nStopped.{GOES_ON.get(arguments[0], '')}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            print("Stopped: what read the output has ended.", file=sys.stderr)
            return 141
        return _tell(error)
    finally:
        if "scripts.launcher" in sys.modules:
            from scripts.launcher import end_children

            end_children(failed)
    return 0


def _nobody_reads() -> bool:
    """Whether standard output leads nowhere, as behind `head`; if so, its rest is dropped."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # a notebook's, say
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _tell(error: Exception) -> int:
    """Prints what a user can act on and returns the exit status; anything else is raised."""
    from fewstep.errors import FewstepError

    clear: Exception | None = error
    if not isinstance(error, FewstepError):
        from scripts.failures import explained

        clear = explained(error)
    if clear is None:
        raise error
    if os.environ.get("FEWSTEP_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {clear}", file=sys.stderr, flush=True)
    return getattr(clear, "status", 2)


if __name__ == "__main__":
    sys.exit(main())

"""The batch script: a template and what is put in its places."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import FewstepError, nearest
from scripts.slurm.options import Options, directives
from scripts.this_fewstep import this_fewstep

SKELETON = Path(__file__).with_name("job.sh")
PLACEHOLDER = re.compile(r"\{\{\s*([^{}\n]*?)\s*\}\}")
NEEDED = ("directives", "run", "command")
SECONDS_TO_FOLLOW = 60


def batch_script(
    options: Options,
    name: str,
    runs: Sequence[Path],
    first_checkpoint: Path | None = None,
    command: Sequence[str] | None = None,
    home: Path | None = None,
) -> str:
    """The text of a job that trains in the given run folders, a task of an array in each.

    Args:
        options: what the user asked for.
        name: the job's name.
        runs: absolute run folders, whose ``slurm/config.yaml`` says what to train.
        first_checkpoint: where to start while the run has no checkpoint of this job's yet.
        command: shell words to run in place of ``fewstep fit``; ``$run`` is the run's folder.
        home: the folder of all runs, which a container sees: theirs and others they start from.

    Raises:
        FewstepError: if the user's template cannot be read or filled.
    """
    tasks, _, at_once = (options.array or "").rpartition("%")
    array = None
    if options.array is not None:
        array = f"0-{len(runs) - 1}" + (f"%{at_once}" if tasks else "")
    parts = {
        "directives": "\n".join(directives(options, name, runs[0] / "slurm" / "%j.out", array)),
        "run": _choose_run(runs) if array else f"run={_quoted(runs[0])}",
        "signal_before": str(options.signal_before),
        "setup": "".join(f"{line}\n" for line in options.setup),
        "checkpoint": _choose_checkpoint(first_checkpoint),
        "launch": " ".join(_launch(options, [home or runs[0].parent])),
        "command": " ".join(command or _command(options)),
    }
    return fill(options.template or SKELETON, parts)


def fill(template: Path, parts: dict[str, str]) -> str:
    """Puts each part in its ``{{place}}``.

    Raises:
        FewstepError: if the file is not there, names an unknown place or lacks a needed one.
    """
    try:
        text = template.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FewstepError(f"The template '{template}' cannot be read: {error}.") from error
    known = ", ".join(f"{{{{{part}}}}}" for part in parts)
    named = PLACEHOLDER.findall(text)
    for place in named:
        if place not in parts:
            raise FewstepError(
                f"The template '{template}' has an unknown placeholder {{{{{place}}}}}."
                f"{nearest(place, parts)} Known: {known}."
            )
    for place in NEEDED:
        if place not in named:
            raise FewstepError(
                f"The template '{template}' lacks {{{{{place}}}}}. Known placeholders: {known}."
            )
    return PLACEHOLDER.sub(lambda found: parts[found[1]], text)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _choose_run(runs: Sequence[Path]) -> str:
    """Each task of the array has a run, and its log, of its own."""
    cases = [f"  {number}) run={_quoted(run)} ;;" for number, run in enumerate(runs)]
    return "\n".join(
        [
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            'exec >>"$run/slurm/$SLURM_JOB_ID.out" 2>&1',
        ]
    )


def _choose_checkpoint(first: Path | None) -> str:
    if first is None:
        return "checkpoint=last"
    # A checkpoint newer than the script was saved by this job, in an earlier start.
    return (
        f"checkpoint={_quoted(first)}\n"
        'if [ "$run/checkpoints/last.ckpt" -nt "$run/slurm/job.sh" ]; then checkpoint=last; fi'
    )


def _launch(options: Options, homes: Sequence[Path]) -> list[str]:
    words = [
        "srun",
        "--open-mode=append",
        '--output="$run/slurm/%j-%t.out"',
        "--kill-on-bad-exit=0",
        f"--wait={SECONDS_TO_FOLLOW}",
    ]
    if options.cpus_per_gpu is not None:
        # Since Slurm 22.05 a step does not take this over from its job.
        words.append(f"--cpus-per-task={options.cpus_per_gpu}")
    image = options.container
    if image is None:
        return words
    here = Path.cwd()
    folders = [here]
    for home in homes:
        # As it is called, and where a link of that name leads to.
        ways = dict.fromkeys([home.absolute(), home.resolve()])
        folders += [way for way in ways if not way.is_relative_to(here)]
    seen = [*(f"{folder}:{folder}" for folder in folders), *map(_mounted, options.mount)]
    mounts, at = shlex.quote(",".join(seen)), _quoted(here)
    if image.endswith(".sif"):
        return [*words, f"apptainer exec --nv --bind {mounts} --pwd {at} {shlex.quote(image)}"]
    mounted = f"--container-mounts={mounts} --container-workdir={at}"
    return [*words, f"--container-image={shlex.quote(image)} {mounted}"]


def _mounted(given: str) -> str:
    """``PATH`` or ``PATH:AS`` with both of its parts, absolute here."""
    path, _, place = given.partition(":")
    here = Path(path).expanduser().absolute()
    return f"{here}:{place or here}"


def fewstep_command(options: Options) -> str:
    """How a job calls fewstep: as installed in its container, or with this very Python."""
    return "fewstep" if options.container else shlex.join(this_fewstep())


def _command(options: Options) -> list[str]:
    return [
        fewstep_command(options),
        "fit",
        '-c "$run/slurm/config.yaml"',
        '--run.version "${run##*/}"',
        '--ckpt_path "$checkpoint"',
    ]

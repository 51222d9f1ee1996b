"""A run's folder: ``runs/<experiment>/<version>/``."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.networks.loading import is_checkpoint, newest_checkpoint


def versions(experiment: Path) -> list[Path]:
    """The runs of an experiment, oldest first."""
    return sorted((p for p in experiment.glob("version_*") if p.is_dir()), key=_number)


def _number(run: Path) -> int:
    """Of a run with a name of fewstep's own; -1 for others, which ``--run.version`` has given."""
    suffix = run.name.removeprefix("version_")
    return int(suffix) if suffix.isdigit() else -1


def run_of_checkpoint(path: Path) -> Path | None:
    """The run's folder a checkpoint lies in, if it lies in one."""
    return path.parent.parent if path.parent.name == "checkpoints" else None


def place_new_run(experiment: Path) -> Path:
    """The folder of the next run."""
    last = max(map(_number, versions(experiment)), default=-1)
    return experiment / f"version_{last + 1}"


def refuse_disagreement(run: Path, num_nodes: int) -> None:
    """Refuses a new run's folder that each node, or each rank, has chosen for itself.

    The first to make its folder would have the others choose the next. Ranks that Lightning starts
    on one machine are told the folder.

    Args:
        run: the folder that this process has chosen.
        num_nodes: how many nodes the run is for.

    Raises:
        FewstepError: unless the folder is there, or this process is the only one to choose.
    """
    ranks = _started_by_others()
    if run.exists() or (num_nodes == 1 and ranks == 1):
        return
    several = f"{num_nodes} nodes" if num_nodes > 1 else f"{ranks} ranks, started from outside,"
    raise FewstepError(
        f"A new run on {several} needs a folder that all agree on: give each of them the same "
        f"--run.version, such as --run.version {run.name} here. `fewstep submit` does so itself."
    )


def _started_by_others() -> int:
    """How many ranks torchrun or srun has started; 1 where neither did."""
    torchrun = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    return int(torchrun or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def place(
    experiment: Path,
    version: str | None,
    ckpt_path: str | None,
    training: bool,
    trained: bool = True,
) -> tuple[Path, Path | None]:
    """Decides which folder a command works in and which checkpoint it starts from.

    Args:
        experiment: ``runs/<experiment>``.
        version: a given version's name, or None.
        ckpt_path: a file, ``last`` (the newest, or none if there is none), or None.
        training: whether the command trains; the others take the newest run by default.
        trained: whether the experiment trains anything; one that does not needs no checkpoint.

    Raises:
        FewstepError: if a checkpoint that is needed is not there.
    """
    if ckpt_path not in (None, "last"):
        checkpoint = Path(str(ckpt_path))
        if checkpoint.is_dir() and not is_checkpoint(checkpoint):
            checkpoint = newest_checkpoint(checkpoint) or checkpoint
        if not is_checkpoint(checkpoint):
            raise FewstepError(
                f"There is no checkpoint '{ckpt_path}'. Leave --ckpt_path out for the newest of "
                f"'{experiment}', or give a .ckpt file."
            )
        home = run_of_checkpoint(checkpoint)
        if version is None and home is not None and home.parent == experiment:
            return home, checkpoint
        return (experiment / version if version else place_new_run(experiment)), checkpoint
    candidates = [experiment / version] if version else versions(experiment)[::-1]
    if training and ckpt_path is None:
        return (candidates[0] if version else place_new_run(experiment)), None
    for run in candidates:
        found = newest_checkpoint(run)
        if found is not None:
            return run, found
    if training or not trained:
        return (candidates[0] if candidates else place_new_run(experiment)), None
    raise FewstepError(f"'{experiment}' holds no run with a checkpoint. {_remedy(experiment)}")


def _remedy(experiment: Path) -> str:
    """What to do where no run was found that could be taken."""
    folders = [run for run in experiment.iterdir() if run.is_dir()] if experiment.is_dir() else []
    folders.sort(key=lambda run: (_number(run), run.name))
    named = [run.name for run in folders if newest_checkpoint(run) is not None]
    if named:
        return f"But {', '.join(named)} has one: give --run.version {named[-1]}."
    if experiment.parts[0] != "runs":
        return "Train it first: `fewstep fit` with the same -c and --run.dir."
    return f"Train it first: fewstep fit -c {'/'.join(experiment.parts[1:])}"

"""Finding and reading trained denoisers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.damaged import reading
from fewstep.networks.lora import LoRADenoiser, is_lora_spec, rebuild
from fewstep.networks.lora_files import merged_denoiser
from fewstep.networks.pipelines import load_denoiser_of, read_null
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder, read_tensors
from fewstep.remembered import sha256_of

METADATA_KEY = "fewstep"


@dataclass(frozen=True)
class LoadedDenoiser:
    """A denoiser read from a checkpoint, and where it came from.

    Attributes:
        pipeline: folder of the diffusers pipeline whose text encoders and VAE go with it.
    """

    denoiser: Denoiser
    source: str
    sha256: str
    role: str
    pipeline: str | None = None


def find_checkpoint(where: str | Path) -> Path:
    """Resolves a checkpoint file, a run's folder or an experiment's folder to a checkpoint file.

    Of an experiment's folder the newest run is taken, of a run its ``last.ckpt``.

    Raises:
        FewstepError: if there is none.
    """
    path = Path(where)
    if is_checkpoint(path):
        return path
    runs = [path, *sorted(path.glob("version_*"), key=_version, reverse=True)]
    for run in runs:
        last = newest_checkpoint(run)
        if last is not None:
            return last
    raise FewstepError(
        f"No checkpoint at '{path}': neither a file nor a run folder with checkpoints/last.ckpt. "
        + _how_to_train(path)
    )


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint file or a whole sharded one."""
    return path.is_file() or is_sharded_checkpoint(path)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    folder = run / "checkpoints"
    # The link may point nowhere if the run was killed while a checkpoint took another's place.
    newest_first = sorted(folder.glob("update_*.ckpt"), reverse=True)
    return next(filter(is_checkpoint, [folder / "last.ckpt", *newest_first]), None)


def _version(path: Path) -> int:
    suffix = path.name.removeprefix("version_")
    return int(suffix) if suffix.isdigit() else -1


def _how_to_train(path: Path) -> str:
    if path.parts and path.parts[0] == "runs":
        below = takewhile(lambda part: not part.startswith("version_"), path.parts[1:])
        name = "/".join(below)
        return f"Train it first: fewstep fit -c experiments/{name}.yaml"
    return "Give the path of a .ckpt file or of a run's folder."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of ours without unpickling code.

    Raises:
        FewstepError: if the file is missing, damaged, unsafe or not a fewstep checkpoint.
    """
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or METADATA_KEY not in checkpoint:
        raise FewstepError(
            f"'{path}' is not a fewstep checkpoint (it has no '{METADATA_KEY}' entry)."
        )
    return checkpoint


def load_denoiser(
    where: str | Path, role: str = "ema", base: str | Path | None = None
) -> LoadedDenoiser:
    """Rebuilds the trained denoiser a checkpoint holds, frozen and in eval mode.

    Args:
        where: see :func:`find_checkpoint`.
        role: whose weights to take; ``ema`` falls back to ``student`` in runs without EMA.
        base: where a LoRA's base is now, see :func:`untrained`.
    """
    path = find_checkpoint(where)
    sharded = is_sharded_checkpoint(path)
    checkpoint = read_remainder(path) if sharded else read_checkpoint(path)
    metadata = checkpoint[METADATA_KEY]
    state = read_tensors(path, "state_dict.") if sharded else checkpoint["state_dict"]
    if role == "ema" and not any(name.startswith("ema.") for name in state):
        role = "student"
    weights = {
        name.removeprefix(f"{role}."): value
        for name, value in state.items()
        if name.startswith(f"{role}.")
    }
    if not weights:
        raise FewstepError(f"'{path}' holds no weights of a role named '{role}'.")
    denoiser = untrained(metadata, base)
    denoiser.load_state_dict(weights)
    denoiser.requires_grad_(False).eval()
    origins = metadata.get("frozen", {}).values()
    pipeline = next((_still_there(o["pipeline"]) for o in origins if "pipeline" in o), None)
    return LoadedDenoiser(denoiser, str(path), _sha256(path), role, pipeline)


def on_its_own(denoiser: Denoiser) -> Denoiser:
    """A denoiser that holds its whole network: a LoRA's is merged with its base."""
    return merged_denoiser(denoiser) if isinstance(denoiser, LoRADenoiser) else denoiser


def untrained(metadata: dict[str, Any], base: str | Path | None = None) -> Denoiser:
    """The denoiser a checkpoint's metadata describe, before its weights are loaded.

    Args:
        metadata: the checkpoint's.
        base: what a LoRA is put on: a pipeline's folder or a checkpoint, wherever it is now. By
            default it is read from where the run read it or, if it is gone from there, from where
            the environment variable ``FEWSTEP_BASE`` says.

    Raises:
        FewstepError: if the base is not there, or another one than the LoRA was trained on.
    """
    spec = metadata["denoiser"]
    if not is_lora_spec(spec):
        return Denoiser.from_spec(spec)
    origin = metadata["frozen"]["teacher"]
    where = str(base or _still_there(origin["source"]))
    found, sha256 = _read_base(where, origin)
    if sha256 != origin["sha256"]:
        raise FewstepError(
            f"'{where}' is another base, or has changed since this LoRA was trained on it: its "
            f"sha256 was {origin['sha256'][:16]}.. and is {sha256[:16]}... {_GIVE_BASE}"
        )
    # Of the run's own sample shape, which need not be what the pipeline was made for.
    own = Denoiser.from_spec({**spec, "alpha_floor": found.alpha_floor})
    if own.backbone.guidance_input is not None:  # which the base itself need not have
        found.backbone.add_guidance_input(own.backbone.config["guidance_embedding_dim"])
    own.load_state_dict(found.state_dict())
    return rebuild(own, spec)


_GIVE_BASE = (
    "Say where the base is: --base FOLDER for `fewstep export`, --model.init_args.teacher FOLDER "
    "for the run's own commands, FEWSTEP_BASE=FOLDER in the environment for anything else."
)


def _still_there(source: str) -> str:
    moved = os.environ.get("FEWSTEP_BASE")
    return source if moved is None or Path(source).exists() else moved


def _read_base(where: str, origin: dict[str, str]) -> tuple[Denoiser, str]:
    """A LoRA's base and its hash."""
    try:
        if origin["weights"] != "pipeline":
            loaded = load_denoiser(where, origin["weights"])
            return on_its_own(loaded.denoiser), loaded.sha256
        empty = origin.get("empty")
        null = read_null(empty) if empty is not None and Path(empty).is_file() else None
        negative = origin.get("negative_prompt")
        pipeline = load_denoiser_of(where, null=null, negative_prompt=negative)
    except FewstepError as error:
        raise FewstepError(f"The base of this LoRA cannot be read. {error} {_GIVE_BASE}") from error
    return pipeline.denoiser, pipeline.sha256


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder in the order of their names."""
    return sha256_of(*sorted(path.iterdir()) if path.is_dir() else [path])

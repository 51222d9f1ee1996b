"""``fewstep shards encode``: latents and text embeddings, computed once instead of every epoch."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError
from scripts.shards.parallel import bar, default_workers

if TYPE_CHECKING:
    from datamodules.fields import Field
    from scripts.shards.encoding import Recipe

EPILOG = """\
Each shard becomes one of the same name that holds latent.safetensors (as the denoising network sees
latents: shifted and scaled), text.safetensors (by the network's own argument names) and copies of
cls, txt and json. DEST/empty.safetensors is what stands for no prompt.

Pipelines are those that fewstep trains (docs/adding_a_family.md). With --frames clips of videos are
encoded, frame by frame where the VAE is one for images. Records without captions need --no-text.

  fewstep shards encode data/pets --pipeline models/sd15 --dest data/pets-latents --device cuda
  fewstep shards encode data/clips --pipeline models/wan --dest data/clips-latents --frames 81 \\
      --fps 16 --size 480 832 --dtype bf16 --device cuda
  sbatch --array=0-31 --gpus=1 --wrap 'fewstep shards encode ... --device cuda'   # a part each
"""
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
REMEDY = "Give the earlier settings to go on, or another --dest to begin anew."
NAMED = 10


def add_to(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = group.add_parser(
        "encode",
        help="latents and text embeddings by a diffusers pipeline",
        description="Encode pixels and captions with the models of a diffusers pipeline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tars, folders of them, globs or {0..9} braces"
    )
    add = parser.add_argument
    add("--pipeline", type=Path, required=True, metavar="FOLDER", help="of a diffusers pipeline")
    add("--dest", type=Path, required=True, help="folder of the new shards")
    add = parser.add_argument_group("what to encode").add_argument
    add("--size", type=int, nargs="+", metavar="N", help="side, or height and width (the model's)")
    add("--frames", type=int, metavar="N", help="of a clip; encodes videos instead of images")
    add("--fps", type=float, metavar="X", help="frames a second of a clip (the file's)")
    add("--no-text", action="store_true", help="leave captions out")
    add("--caption-entry", default="caption", metavar="NAME", help="in json (%(default)s)")
    add("--latents", choices=["sample", "mean", "moments"], default="sample", help="(%(default)s)")
    add("--dtype", choices=list(DTYPES), default="fp16", help="of what is stored (%(default)s)")
    add("--seed", type=int, default=0, help="of sampled latents (%(default)s)")
    add("--max-damaged", type=int, default=100, metavar="N", help="then give up (%(default)s)")
    add = parser.add_argument_group("how to compute").add_argument
    add("--device", default="cpu", help="such as cuda (%(default)s)")
    add("--compute-dtype", choices=list(DTYPES), default="fp32", help="(%(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="records at a time (%(default)s)")
    add("--workers", type=int, default=default_workers(), help="decoding processes (%(default)s)")
    add("--task", type=int, help="which part of the work (its number in a SLURM array)")
    add("--tasks", type=int, help="number of parts (the size of the SLURM array)")


def run(options: argparse.Namespace) -> int:
    """Runs the sub-command."""
    import torch

    from datamodules.catalogue import catalogue
    from datamodules.sources import Sources
    from scripts.shards.encoding import Loading, encode_shards, shard_name, write_empty
    from scripts.shards.pipelines import Encoder
    from scripts.shards.tars import agree, whole

    sources = Sources()
    shards = sources.expand(options.shards)
    _check_names([shard_name(shard) for shard in shards])
    task, tasks = part_of_work(options.task, options.tasks, os.environ)
    size = _size(options)
    recipe = _recipe(options, size)
    agree(options.dest / "encode.json", settings(options, size), REMEDY)
    mine = shards[task::tasks]
    due = [shard for shard in mine if not whole(options.dest / shard_name(shard))]
    empty = options.dest / "empty.safetensors"
    if due or not (options.no_text or empty.exists()):
        computing = getattr(torch, DTYPES[options.compute_dtype])
        encoder = Encoder(options.pipeline, options.device, computing, not options.no_text)
        encoder.check(size, options.frames)
        if not options.no_text and not empty.exists():
            write_empty(encoder, options.dest, recipe.dtype)
        loading = Loading(catalogue(sources, due), sources, recipe)
        with bar(sum(loading.catalogue.sizes), "Encoding", "record") as progress:
            skipped = encode_shards(
                encoder,
                recipe,
                loading,
                options.dest,
                options.workers,
                options.max_damaged,
                progress,
            )
        for item in skipped[:NAMED]:
            print(f"Left out: {item}")
        if skipped:
            print(f"{len(skipped):,} damaged records were left out.")
    print(f"{len(due):,} shards encoded, {len(mine) - len(due):,} were there: {options.dest}")
    return 0


def part_of_work(
    task: int | None, tasks: int | None, environment: Mapping[str, str]
) -> tuple[int, int]:
    """Which part of the work is this process's: its number, and how many there are.

    Args:
        task, tasks: as the user says; by default as SLURM's job arrays do.
        environment: SLURM's variables.

    Raises:
        FewstepError: if only one is given, or the number is not below the count.
    """
    if task is None and tasks is None:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        task = (int(environment.get("SLURM_ARRAY_TASK_ID", first)) - first) // step
        tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    if task is None or tasks is None:
        raise FewstepError("--task and --tasks go together: give both or neither.")
    if not 0 <= task < tasks:
        raise FewstepError(f"--task {task} is not one of the numbers 0 to {tasks - 1}.")
    return task, tasks


def settings(options: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """All that the encoded values depend on."""
    from scripts.shards.pipelines import pipeline_name, weights_hash

    named = ("frames", "fps", "latents", "dtype", "compute_dtype", "seed", "batch_size")
    return {
        "pipeline": pipeline_name(options.pipeline),
        "weights": weights_hash(options.pipeline, not options.no_text),
        "size": size,
        "text": not options.no_text,
        "caption_entry": options.caption_entry,
        **{name: getattr(options, name) for name in named},
    }


def _size(options: argparse.Namespace) -> tuple[int, int]:
    from scripts.shards.pipelines import native_size, pipeline_name

    pipeline_name(options.pipeline)  # first of all, is it a pipeline?
    given = options.size or native_size(options.pipeline)
    if given is None:
        raise FewstepError("The pipeline does not tell for which size it was made; give --size.")
    if len(given) > 2 or min(given) < 1:
        raise FewstepError("--size takes one side, or height and width.")
    return int(given[0]), int(given[-1])


def _recipe(options: argparse.Namespace, size: tuple[int, int]) -> Recipe:
    import torch

    from datamodules.fields import Caption, Images, Videos
    from scripts.shards.encoding import Recipe

    if options.fps is not None and options.frames is None:
        raise FewstepError("--fps is about videos; give --frames too.")
    pixels: Field = Images(size)
    if options.frames is not None:
        pixels = Videos(options.frames, size, options.fps)
    return Recipe(
        pixels=pixels,
        caption=None if options.no_text else Caption(options.caption_entry),
        latents=options.latents,
        dtype=getattr(torch, DTYPES[options.dtype]),
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _check_names(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FewstepError(
            f"{len(twice):,} shards share a name, such as '{min(twice)}', and would overwrite one "
            "another. Encode their folders one by one, each into a --dest of its own."
        )

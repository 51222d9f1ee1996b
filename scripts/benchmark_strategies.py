"""Our training step, weight averaging and checkpoints on one and on several devices, in one run.

Every method trains a random DiT on random data with Lightning's Trainer and our strategies. Blocks
of PCM's steps take turns with a straightforward loop of the same mathematics: guidance in two
passes, an EMA loop over parameters, the loss read on the host at every step, and torch's own
DistributedDataParallel (ddp), or fully_shard around the student and its average with the teacher
whole on every rank (fsdp2). A checkpoint's counterpart is torch.save of the same state, gathered on
the first rank if it is sharded. A ratio is the straightforward way's time over ours: above 1, ours
is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from fewstep.errors import FewstepError
from scripts.benchmarks.contestants import COUNTERPART, Case, Method, Precision, Settings, Strategy
from scripts.benchmarks.launch import launch
from scripts.benchmarks.memory import MEANING
from scripts.benchmarks.rank import measure_case
from scripts.benchmarks.table import Row, header, name_of, rows_of

EXAMPLES = """
examples:
  a mid-size network on a laptop, all strategies and methods:
    python -m scripts.benchmark_strategies
  sharding alone, of a network of DiT-XL's size on the 8 GPUs of a machine:
    python -m scripts.benchmark_strategies --device cuda --ranks 8 --strategies fsdp2 \\
        --width 1152 --layers 28 --size 32 --batch 32 --json sharded.json
  does bf16 pay, does compilation:
    python -m scripts.benchmark_strategies --device cuda --strategies ddp --methods pcm \\
        --precision 32-true bf16-mixed --compile off on
  checkpoints to the file system that runs are on:
    python -m scripts.benchmark_strategies --methods pcm --folder /scratch/me
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        prog="python -m scripts.benchmark_strategies",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, size = made.add_argument, Settings()
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--ranks", type=int, help="processes of ddp and fsdp2; 2, or all GPUs, by default")
    add("--threads", type=int, default=0, help="CPU threads a rank; cores / ranks by default")
    add("--width", type=int, default=size.width, help="of the DiT (%(default)s)")
    add("--layers", type=int, default=size.layers, help="of the DiT (%(default)s)")
    add("--size", type=int, default=size.size, help="height and width of a latent (%(default)s)")
    add("--batch", type=int, default=size.batch, help="samples a rank (%(default)s)")
    add("--steps", type=int, help="steps a block; 1, or 10 on a GPU, by default")
    add("--blocks", type=int, default=size.blocks, help="timed blocks of each side (%(default)s)")
    for name, values in (("strategies", Strategy), ("methods", Method)):
        choices = get_args(values)
        add(f"--{name}", nargs="+", choices=choices, default=choices, help="all by default")
    add(
        "--precision",
        nargs="+",
        choices=get_args(Precision),
        default=["32-true", "bf16-mixed"] if cuda else ["32-true"],
        help="of PCM (the other methods: the first one); on a GPU both by default",
    )
    add(
        "--compile",
        nargs="+",
        choices=["off", "on"],
        default=["off", "on"] if cuda else ["off"],
        help="PCM's blocks (the other methods: the first one); on a GPU both by default",
    )
    add("--folder", type=Path, help="where checkpoints are written and removed again")
    add("--json", type=Path, help="file to write the table and all ranks' findings to as well")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """Checks sizes and ranks.

    Raises:
        FewstepError: for a size that makes no network, or more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    if options.device == "cuda" and not gpus:
        raise FewstepError("There is no CUDA device here; give --device cpu.")
    if options.ranks is None:
        options.ranks = gpus or 2
    if options.steps is None:
        options.steps = 10 if gpus else 1
    if gpus and options.ranks > gpus:
        raise FewstepError(f"{options.ranks} ranks need as many GPUs; give --ranks {gpus} or less.")
    names = ("ranks", "width", "layers", "size", "batch", "steps", "blocks")
    low = [f"--{name}" for name in names if getattr(options, name) < 1]
    if low:
        raise FewstepError(f"{', '.join(low)} must be at least 1.")
    if options.width % 64 and (options.width > 64 or options.width % 4):
        raise FewstepError(
            f"--width {options.width} cannot be divided into heads: give a multiple of 64, or, "
            "below that, of 4."
        )
    if options.size % 2:
        raise FewstepError(f"--size {options.size} cannot be divided into patches of 2 x 2.")
    known = {name: getattr(options, name) for name in asdict(Settings())}
    return Settings(**known)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """PCM, or else the first method, has the measurements beside the step and the variants."""
    main = COUNTERPART if COUNTERPART in options.methods else options.methods[0]
    compiled = [choice == "on" for choice in options.compile]
    variants = list(product(options.precision, compiled))
    return [
        Case(strategy, method, *variant, detailed=method == main and number == 0)
        for strategy in options.strategies
        for method in options.methods
        for number, variant in enumerate(variants if method == main else variants[:1])
    ]


def head(settings: Settings) -> dict[str, Any]:
    """What was measured, and where, in plain values."""
    cuda = settings.device == "cuda"
    return {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "cores": torch.multiprocessing.cpu_count(),
        "torch": torch.__version__,
        "memory": MEANING[settings.device],
    }


def run(
    settings: Settings, cases: Sequence[Case], folder: Path | None
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Measures case after case and prints their rows as they come; also all that ranks found."""
    rows: list[Row] = []
    findings: list[dict[str, Any]] = []
    with tqdm(cases, leave=False, disable=None) as bar:
        for case in bar:
            bar.set_description(f"{case.strategy}, {name_of(case)}")
            with tempfile.TemporaryDirectory(dir=folder) as own:
                ranks = launch(
                    measure_case, case.ranks(settings), settings.device, case, settings, own
                )
            if not findings:
                with bar.external_write_mode():
                    print(_about(settings, ranks[0]["parameters"]), header(), sep="\n", flush=True)
            findings.append({**asdict(case), "ranks": ranks})
            for row in rows_of(case, settings, ranks):
                with bar.external_write_mode():
                    print(row.text(), flush=True)
                rows.append(row)
    return rows, findings


def _about(settings: Settings, parameters: int) -> str:
    known = head(settings)
    place = known["device"] if settings.device == "cuda" else f"{known['cores']} CPU cores"
    return (
        f"DiT of {parameters / 1e6:.1f} M parameters, width {settings.width}, "
        f"{settings.layers} layers, latents 4 x {settings.size} x {settings.size}; "
        f"{settings.batch} samples a rank; ddp and fsdp2 on {settings.ranks} ranks\n"
        f"{place}, torch {known['torch']}; medians over {settings.blocks} blocks of "
        f"{settings.steps} steps\n"
        f"ratio: straightforward / ours; memory: {known['memory']}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options)
        rows, findings = run(settings, cases_of(options), options.folder)
    except FewstepError as error:
        sys.exit(f"Error: {error}")
    if options.json is not None:
        found = {**head(settings), "rows": [row.as_dict() for row in rows], "findings": findings}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

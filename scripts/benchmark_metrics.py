"""FID of a set of images: fewstep's against torch-fidelity's and torchmetrics', in one run.

Each looks at the same made-up images through the same weights, in full float32 and in a process of
its own, so that its peak memory is its own. Rounds alternate, and each one's median is compared.
A quarter of the images shows whether memory grows with their number. Features alone, which come
without a network and so can be many, show the same of what follows it.

    python -m scripts.benchmark_metrics --images 10000 --size 256 --features 50000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from scripts.benchmarks.fid import CONTESTANTS, NAMES, Found, Settings, random_weights


def in_own_process(name: str, settings: Settings) -> Found:
    """Measures one contestant in a new process."""
    command = [sys.executable, "-m", "scripts.benchmark_metrics", "--only", name]
    given = json.dumps(asdict(settings))
    process = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stderr}")
    return Found(**json.loads(process.stdout.splitlines()[-1]))


def report_one(name: str) -> None:
    """Measures one contestant in this process, by settings from standard input, and prints it."""
    settings = Settings(**json.loads(sys.stdin.read()))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.backends.cudnn.allow_tf32 = False
    print(json.dumps(asdict(CONTESTANTS[settings.of][name](settings))))


def middle(rounds: Sequence[Found]) -> Found:
    """The medians of several."""
    columns = zip(*(asdict(found).values() for found in rounds), strict=True)
    return Found(*(statistics.median(column) for column in columns))


def table(of: str, full: dict[str, Found], quarter: dict[str, Found]) -> str:
    """Every contestant's figures, and those of the others as multiples of ours."""
    mega = 1024**2
    lines = [
        f"{'':16s}{of + '/s':>12s}{'ours is':>9s}{'distance':>11s}{'ours is':>9s}"
        f"{'peak memory':>13s}{'of a quarter':>14s}{'FID':>14s}"
    ]
    mine = full["ours"]
    for name, found in full.items():
        faster, sooner = mine.rate / found.rate, found.distance / mine.distance
        lines.append(
            f"{name:16s}{found.rate:12.2f}{faster:8.2f}x{found.distance:9.2f} s{sooner:8.2f}x"
            f"{found.memory / mega:9.0f} MiB{quarter[name].memory / mega:10.0f} MiB"
            f"{found.value:14.6f}"
        )
    grown = {name: (full[name].memory - quarter[name].memory) / mega for name in full}
    growth = ", ".join(f"{name} {more:+.0f} MiB" for name, more in grown.items())
    lines.append(f"memory of all {of} over that of a quarter: {growth}")
    return "\n".join(lines)


def compare(settings: Settings, rounds: int) -> str:
    """All contestants, alternating, with all images or features and once with a quarter."""
    found: dict[str, list[Found]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(in_own_process(name, settings))
    fewer = replace(settings, count=settings.count // 4)
    quarter = {name: in_own_process(name, fewer) for name in NAMES}
    half = settings.count // 2
    size = f" of {settings.size} x {settings.size}" if settings.of == "images" else ""
    title = (
        f"FID of {half} against {half} {settings.of}{size}, batches of {settings.batch}, "
        f"{settings.device}, float32, rounds {rounds}, {settings.clock} time"
    )
    middles = {name: middle(results) for name, results in found.items()}
    return f"{title}\n{table(settings.of, middles, quarter)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000, help="both sets together; 0: none")
    parser.add_argument("--features", type=int, default=50_000, help="both sets; 0: none")
    parser.add_argument("--size", type=int, default=256, help="height and width of an image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as many as it likes")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", help="of Inception; random ones are made without it")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    options = parse(arguments)
    if options.only:
        report_one(options.only)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or str(Path(folder, "inception.pth"))
        if not options.weights and options.images:
            random_weights(Path(weights))
        for of, count in (("images", options.images), ("features", options.features)):
            if not count:
                continue
            settings = Settings(
                of=of,
                count=count,
                size=options.size,
                batch=options.batch,
                device=options.device,
                weights=weights,
                threads=options.threads,
                clock=options.clock,
            )
            print(compare(settings, options.rounds), flush=True)


if __name__ == "__main__":
    main()

"""Our step of adversarial PCM with a LoRA student against a straightforward one, in one run.

The network is a Stable Diffusion U-Net with random weights, guided in the teacher's solver. Three
ways to train its student and its discriminator once, all the same mathematics on the same draws:

  ours             one base for teacher, student, average and features; guidance in one pass;
                   the discriminator's turn uses what was computed for the student's
  straightforward  as public scripts of LCM and PCM are written: a base each for teacher and
                   student, guidance in two passes, features extracted anew for each loss, an
                   average that is a loop over parameters, losses read on the host at every step
  alternating      the same, with turns as in PCM's released script: the discriminator's begins
                   with teacher and student once more, so that an update of both is two steps

A ratio is ours over another's: below 1, ours takes less. The aims are 0.75 of the time and 0.6 of
the memory. What bounds them is printed below the table, as counted and measured in the same run:

  time    network evaluations. Ours has 6 forward and 2 backward, the straightforward step 7 and 2:
          0.89, if all cost the same, however fast each is. Against alternating turns (11 and 2)
          it is 0.62.
  memory  activations. They are the same on both sides: the student's and those of the features
          are needed at once. The ratio nears that of the weights only where these outweigh them:
          large networks, small batches, or --checkpoint, which computes them once more.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from fewstep.contracts import Batch
from fewstep.errors import FewstepError
from scripts.benchmark_step import Step, measure
from scripts.benchmarks.adversarial import Dtype, Settings, random_batch
from scripts.benchmarks.adversarial_steps import Contestant, Ours, Straightforward
from scripts.benchmarks.adversarial_table import report
from scripts.benchmarks.launch import launch
from scripts.benchmarks.memory import PeakMemory, local_bytes
from scripts.benchmarks.stopwatch import Stopwatch

SIZES: dict[str, dict[str, Any]] = {
    "mid": {},
    "sd15": {
        "channels": (320, 640, 1280, 1280),
        "text_width": 768,
        "latent": 64,
        "batch": 16,
        "rank": 64,
    },
}
TINY = Settings(channels=(32, 32), text_width=32, latent=8, batch=1, rank=2)
EXAMPLES = """
examples:
  a mid-size network on a laptop, in a minute or two:
    python -m scripts.benchmark_adversarial
  Stable Diffusion 1.5 on a GPU:
    python -m scripts.benchmark_adversarial --size sd15 --dtype bf16 --rank 64 --batch 16 --compile
  with activations computed once more on both sides, as experiments/sd15 trains:
    python -m scripts.benchmark_adversarial --size sd15 --dtype bf16 --checkpoint
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m scripts.benchmark_adversarial",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, dtypes = made.add_argument, get_args(Dtype)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=SIZES, default="mid", help="what the next five options begin from")
    add("--channels", type=int, nargs="+", help="of the U-Net's levels (64 128 256)")
    add("--text-width", type=int, help="channels of the text, 77 tokens of it (256)")
    add("--latent", type=int, help="height and width of a latent (32; sd15: 64)")
    add("--batch", type=int, help="samples a step (1; sd15: 16)")
    add("--rank", type=int, help="of the LoRA (16; sd15: 64)")
    add("--head-width", type=int, help="channels inside a discriminator's head (64)")
    add("--head-kernel", type=int, choices=[1, 3], help="of its convolutions (3)")
    add("--dtype", choices=dtypes, help="bf16: autocast, and our frozen base is kept in it (fp32)")
    add(
        "--plain-bases",
        choices=dtypes,
        help="what the other side keeps its bases in with --dtype bf16 (fp32, as PCM's script)",
    )
    add("--compile", dest="compiled", action="store_true", help="compile blocks, on both sides")
    add("--checkpoint", action="store_true", help="recompute activations, on both sides")
    add("--blocks", type=int, help="timed blocks of each way; they take turns (3)")
    add("--steps", type=int, help="steps a block; 1, or 10 on a GPU, by default")
    add("--threads", type=int, help="CPU threads; torch's own choice by default")
    add("--json", type=Path, help="file to write all findings to as well")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """The named size with what was given instead.

    Raises:
        FewstepError: for a size that makes no network, or a device that is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FewstepError("There is no CUDA device here; give --device cpu.")
    asked = {f.name: getattr(options, f.name) for f in fields(Settings)}
    asked["steps"] = asked["steps"] or (10 if options.device == "cuda" else 1)
    given = {name: value for name, value in asked.items() if value is not None}
    made = Settings(**{**SIZES[options.size], **given, "channels": _channels(options)})
    counts = ("text_width", "latent", "batch", "rank", "head_width", "blocks", "steps")
    low = [f"--{name.replace('_', '-')}" for name in counts if getattr(made, name) < 1]
    if low:
        raise FewstepError(f"{', '.join(low)} must be at least 1.")
    divisor = 2 ** (len(made.channels) - 1)
    if made.latent % divisor:
        raise FewstepError(
            f"--latent {made.latent} cannot be halved between {len(made.channels)} levels: give "
            f"a multiple of {divisor}."
        )
    return made


def _channels(options: argparse.Namespace) -> tuple[int, ...]:
    channels = tuple(options.channels or SIZES[options.size].get("channels", Settings.channels))
    if len(channels) < 2 or any(width < 32 or width % 32 for width in channels):
        raise FewstepError("--channels needs two or more multiples of 32, such as 64 128 256.")
    return channels


# ---------------------------------------------------------------------- measurements


def prepare(settings: Settings) -> None:
    """Makes this process ready; libraries are loaded by a step of a tiny network."""
    warnings.simplefilter("ignore")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.compiled:
        # Both sides' networks share the code that is compiled, in a process of one run they do not.
        torch._dynamo.config.recompile_limit = 256
    Ours(TINY).step(random_batch(TINY), 0)


def time_ways(settings: Settings) -> dict[str, Any]:
    """Seconds a step of each way, blocks taking turns; then who they go to, in a step more."""
    prepare(settings)
    batch = random_batch(settings)
    mine, other = Ours(settings), Straightforward(settings)
    steps: dict[str, tuple[Contestant, Step]] = {
        "ours": (mine, mine.step),
        "straightforward": (other, other.step),
        "alternating": (other, other.alternating_step),
    }
    found = measure(
        {name: step for name, (_, step) in steps.items()}, batch, settings.blocks, settings.steps
    )
    ways = {}
    watches = {id(side): Stopwatch(side, settings.batch) for side in (mine, other)}
    for name, (side, step) in steps.items():
        watch = watches[id(side)]
        ways[name] = {"seconds": found[name], **_split(watch, step, batch)}
    inner = mine.teacher.backbone
    return {
        "ways": ways,
        "parameters": sum(p.numel() for p in inner.parameters()),
        "trained": {role: sum(p.numel() for p in ps) for role, ps in mine.trained().items()},
    }


def _split(watch: Stopwatch, step: Step, batch: Batch) -> dict[str, Any]:
    watch.restart()
    taken = watch.measure(partial(step, batch, 0))
    whole = sum(taken.values())
    return {
        "shares": {role: seconds / whole for role, seconds in taken.items()},
        "forward": dict(watch.forward),
        "backward": dict(watch.backward),
        "calls": watch.calls,
    }


SIDES: dict[str, Callable[[Settings], Contestant]] = {
    "ours": Ours,
    "straightforward": Straightforward,
}


def weigh(name: str, settings: Settings) -> dict[str, int]:
    """Peak memory of a side that is alone in its process, and what it holds between steps."""
    prepare(settings)
    gc.collect()
    peak, batch = PeakMemory(settings.device), random_batch(settings)
    side = SIDES[name](settings)
    side.step(batch, 0)  # optimisers make their states, compilation is over
    peak.restart()
    for update in (1, 2):
        side.step(batch, update)
    return {"peak": peak.read(), "held": local_bytes(side.held())}


def run(settings: Settings) -> dict[str, Any]:
    """All measurements, in processes of their own."""
    found: dict[str, Any] = {"settings": asdict(settings), "memory": {}}
    for name in SIDES:
        (found["memory"][name],) = launch(weigh, 1, settings.device, name, settings)
    (timed,) = launch(time_ways, 1, settings.device, settings)
    return {**found, **timed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options)
        found = run(settings)
    except FewstepError as error:
        sys.exit(f"Error: {error}")
    print(report(settings, found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Our PCM training step against a straightforward one, as a ratio measured in one run.

The straightforward step is what public scripts do: classifier-free guidance in two passes, an EMA
loop over parameters, the loss read on the host at every step. Both do the same mathematics on the
same network and batch; blocks of steps alternate, and the median block of each is compared.

    python -m scripts.benchmark_step --device cuda --width 512 --layers 12 --batch 64
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fewstep.contracts import Batch
from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.diffusion.losses import pseudo_huber
from fewstep.diffusion.tables import expand_to
from fewstep.networks import DiT, ema_update
from fewstep.seeding import torch_generator
from lightning_modules import PhasedConsistencyDistillation
from lightning_modules.phased_consistency_distillation import PhasedDraws

EMA_DECAY = 0.999
GUIDANCE = (4.0, 5.0)
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-5)
Step = Callable[[Batch, int], None]


def make_module(options: argparse.Namespace) -> PhasedConsistencyDistillation:
    """A PCM student of the asked size, with guidance in its solver."""

    def teacher() -> Denoiser:
        network = DiT(
            options.size, 4, 2, options.layers, options.width // 64 or 1, min(64, options.width)
        )
        return Denoiser(network, VPSchedule(), "v_prediction")

    module = PhasedConsistencyDistillation(
        teacher, 4, 40, guidance_range=GUIDANCE, optimizer=OPTIMIZER, ema_decay=EMA_DECAY
    )
    module.configure_model()
    return module.to(options.device)


def drawn(module: PhasedConsistencyDistillation, batch: Batch, update: int) -> PhasedDraws:
    """What a step draws, the same on both sides."""
    return module.draw(batch, torch_generator(0, "bench", update, device=module.device))


def our_step(module: PhasedConsistencyDistillation) -> Step:
    """The step that fewstep trains with."""
    parameters = list(module.student.parameters())
    optimizer = OPTIMIZER(parameters)

    def step(batch: Batch, update: int) -> None:
        (found,) = module.updates(batch, drawn(module, batch, update))
        found.loss.backward(inputs=parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert module.ema is not None
        ema_update(module.ema, module.student, EMA_DECAY)

    return step


def straightforward_step(
    module: PhasedConsistencyDistillation,
    draw: Callable[[Batch, int], PhasedDraws] | None = None,
    low_precision: torch.dtype | None = None,
) -> Step:
    """The same mathematics, written as most public scripts write it.

    Args:
        module: whose roles are used; torch's wrappers may be around the student and its average.
        draw: what a step draws for (batch, update); :func:`drawn` by default.
        low_precision: what autocast computes the loss in; null computes it in float32.
    """
    student, average, draw = module.student, module.ema, draw or partial(drawn, module)
    assert average is not None
    decay = module.ema_decay or 0.0
    optimizer = module.make_optimizer["student"](student.parameters())

    def step(batch: Batch, update: int) -> None:
        draws = draw(batch, update)
        with torch.autocast(module.device.type, low_precision, enabled=low_precision is not None):
            loss = _straightforward_loss(module, batch, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average_by_loop(average, student, decay)
        loss.item()

    return step


@torch.no_grad()
def average_by_loop(average: nn.Module, student: nn.Module, decay: float) -> None:
    """An EMA update, one parameter after the other."""
    for kept, current in zip(average.parameters(), student.parameters(), strict=True):
        kept.mul_(decay).add_(current, alpha=1 - decay)


def _straightforward_loss(
    module: PhasedConsistencyDistillation, batch: Batch, draws: PhasedDraws
) -> torch.Tensor:
    schedule, cond, x0 = module.schedule, batch["cond"], batch["sample"]
    grid, index = module.phases.grid, draws.index
    t, p = (table.on(index.device)[index] for table in (grid.times, grid.previous))
    s = module.phases.edge_of.on(index.device)[index]
    x_t = schedule.add_noise(x0, draws.noise, t)
    with torch.no_grad():
        conditional = module.teacher(x_t, t, cond)
        unconditional = module.teacher(x_t, t, module.teacher.backbone.null_cond(cond))
        jumps = [schedule.jump(found, p) for found in (conditional, unconditional)]
        x_p = jumps[1] + expand_to(draws.guidance, x0) * (jumps[0] - jumps[1])
        target = schedule.jump(module.student(x_p, p, cond), s)
        target = torch.where(expand_to(p == s, target), x_p, target)
    return pseudo_huber(schedule.jump(module.student(x_t, t, cond), s), target)


def measure(steps: dict[str, Step], batch: Batch, blocks: int, length: int) -> dict[str, float]:
    """Median seconds a step of each, blocks alternating."""

    def synchronise() -> None:
        if batch["sample"].is_cuda:
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(blocks + 1):
        for name, step in steps.items():
            synchronise()
            started = time.perf_counter()
            for update in range(length):
                step(batch, block * length + update)
            synchronise()
            if block:  # the first block warms up
                times[name].append((time.perf_counter() - started) / length)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=16, help="height and width of a latent")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--length", type=int, default=5, help="steps a block")
    options = parser.parse_args()
    module = make_module(options)
    batch: Batch = {
        "sample": torch.randn(options.batch, 4, options.size, options.size, device=options.device),
        "cond": {"class_labels": torch.arange(options.batch, device=options.device) % 10},
        "key": [],
    }
    # Each trains a student of its own, so that neither warms the other's caches.
    other = straightforward_step(make_module(options))
    steps = {"ours": our_step(module), "straightforward": other}
    found = measure(steps, batch, options.blocks, options.length)
    count = sum(p.numel() for p in module.student.parameters())
    print(f"{count / 1e6:.1f} M parameters, batch {options.batch}, {options.device}")
    for name, seconds in found.items():
        print(f"{name:16s} {1000 * seconds:8.2f} ms a step")
    print(f"straightforward / ours = {found['straightforward'] / found['ours']:.3f}")


if __name__ == "__main__":
    main()

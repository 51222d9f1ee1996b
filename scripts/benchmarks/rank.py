"""What one rank measures of a case."""

from __future__ import annotations

import logging
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from callbacks import Checkpoints
from fewstep.networks import ema_update
from lightning_modules import FewStepModule
from scripts.benchmark_step import Step, average_by_loop, measure
from scripts.benchmarks.contestants import (
    COUNTERPART,
    Case,
    RandomData,
    Settings,
    make_method,
    place,
    plain_module,
    plain_step,
    trainer_of,
)
from scripts.benchmarks.memory import PeakMemory, local_bytes
from scripts.plan import Strategy as PlannedStrategy
from scripts.plan import plan_of

EMA_BLOCKS, EMA_LENGTH, SAVES = 7, 5, 3
ROOT = Path(__file__).parents[2]


class Blocks(Callback):
    """Times blocks of our steps in the Trainer's own loop; between them a counterpart has its turn.

    Args:
        case, settings: what is measured.
        peak: its peak is read before there is a counterpart.
    """

    def __init__(self, case: Case, settings: Settings, peak: PeakMemory) -> None:
        self.case, self.settings, self.peak = case, settings, peak
        self.found: dict[str, Any] = {"parameters": 0, "plain_step": None, "waits": None}
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.checking = False
        self._other: Callable[[], None] | None = None
        self._begun = 0.0

    @property
    def timed_updates(self) -> int:
        """A block to warm up, and those that count."""
        return self.settings.steps * (self.settings.blocks + 1)

    @property
    def updates(self) -> int:
        """And on a GPU one in which the host must not wait for it."""
        return self.timed_updates + (self.settings.device == "cuda")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock on what building the networks has left."""
        self.peak.restart()
        self._begin(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """After all timed steps: makes waiting for the device an error."""
        if trainer.global_step == self.timed_updates and not self.checking:
            self.checking = True
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Ends a block, lets the counterpart have its own, and begins the next."""
        if self.checking:
            torch.cuda.set_sync_debug_mode("default")
            self.found["waits"] = "none"
            return
        if trainer.global_step % self.settings.steps:
            return
        module = cast(FewStepModule, pl_module)
        self.ours.append(self._end(trainer))
        if len(self.ours) == 1:
            self.found["memory"] = self.peak.read()
            if self.case.method == COUNTERPART:
                self._other = self._counterpart(trainer)
        if self._other is not None:
            self._begin(trainer)
            self._other()
            self.theirs.append(self._end(trainer))
        if trainer.global_step == self.timed_updates:
            self._conclude(trainer, module)
        self._begin(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Names the line that waited for the device, if that is what went wrong."""
        if self.checking:
            torch.cuda.set_sync_debug_mode("default")
            if "synchroniz" in str(exception):
                self.found["waits"] = own_line(exception)

    def _conclude(self, trainer: pl.Trainer, module: FewStepModule) -> None:
        """What is known and measured once all blocks are done; the first of each warmed up."""
        self.found["parameters"] = sum(p.numel() for p in module.student.parameters())
        self.found["step"] = statistics.median(self.ours[1:])
        if self.theirs:
            self.found["plain_step"] = statistics.median(self.theirs[1:])
        self.found["roles"] = role_bytes(trainer, module)
        self._other = None
        if self.case.detailed:
            self.found["ema"] = time_ema(module)
            self.found["checkpoint"] = time_checkpoints(trainer, module)

    def _counterpart(self, trainer: pl.Trainer) -> Callable[[], None]:
        device = trainer.strategy.root_device
        module = plain_module(self.case, self.settings, device)
        step = plain_step(module, self.case, trainer.global_rank)
        data = enumerate(RandomData(self.settings, trainer.global_rank))

        def block() -> None:
            for _ in range(self.settings.steps):
                update, batch = next(data)
                step(place(batch, device), update)

        return block

    def _begin(self, trainer: pl.Trainer) -> None:
        _synchronise()
        trainer.strategy.barrier()
        self._begun = time.perf_counter()

    def _end(self, trainer: pl.Trainer) -> float:
        """Seconds a step."""
        _synchronise()
        return (time.perf_counter() - self._begun) / self.settings.steps


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def own_line(error: BaseException) -> str:
    """The innermost line of this project in an error's traceback, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if f.filename.startswith(str(ROOT)) and "site-packages" not in f.filename
    ]
    found = (own or frames)[-1]
    name = found.filename.removeprefix(f"{ROOT}{os.sep}")
    return f"{name}:{found.lineno}: {found.line}"


# ---------------------------------------------------------------------- beside the step


def role_bytes(trainer: pl.Trainer, module: FewStepModule) -> dict[str, dict[str, int]]:
    """Bytes of each role's weights and optimiser states on this rank."""
    found = {
        name: {"weights": local_bytes(role.parameters()), "optimizer": 0}
        for name, role in module.named_children()
        if any(True for _ in role.parameters())
    }
    for name, optimizer in zip(module.trained_roles, trainer.optimizers, strict=True):
        states = [value for state in optimizer.state.values() for value in state.values()]
        found[name]["optimizer"] = local_bytes(states)
    return found


def time_ema(module: FewStepModule) -> list[float]:
    """Seconds of our EMA update and of a loop over parameters."""
    average = module.ema
    assert average is not None
    decay = 0.999

    def ours(batch: Any, update: int) -> None:
        ema_update(average, module.student, decay)

    def loop(batch: Any, update: int) -> None:
        average_by_loop(average, module.student, decay)

    return _alternate(ours, loop, module, EMA_BLOCKS, EMA_LENGTH)


def time_checkpoints(trainer: pl.Trainer, module: FewStepModule) -> dict[str, Any]:
    """Seconds and bytes of our checkpoint and of the straightforward one."""
    callback = Checkpoints(every_n_updates=0, keep=1)
    folder = Path(trainer.default_root_dir)
    plain = folder / "plain.ckpt"

    def ours(batch: Any, update: int) -> None:
        callback.save(trainer)

    def straightforward(batch: Any, update: int) -> None:
        save_whole(trainer, module, plain)

    seconds = _alternate(ours, straightforward, module, SAVES, 1)
    written = (folder / "checkpoints" / "last.ckpt").resolve()
    files = [f for f in written.rglob("*") if f.is_file()] if written.is_dir() else [written]
    sizes = [sum(file.stat().st_size for file in files), plain.stat().st_size]
    return {"seconds": seconds, "bytes": sizes}


def _alternate(
    ours: Step, other: Step, module: FewStepModule, blocks: int, length: int
) -> list[float]:
    batch: Any = {"sample": torch.empty(0, device=module.device)}  # says where to synchronise
    found = measure({"ours": ours, "other": other}, batch, blocks, length)
    return [found["ours"], found["other"]]


def save_whole(trainer: pl.Trainer, module: FewStepModule, path: Path) -> None:
    """The same state, whole on the first rank, in one file; a collective."""
    writes = trainer.is_global_zero

    def gathered(tensor: DTensor) -> Any:
        whole = tensor.full_tensor()
        return whole.cpu() if writes else None

    state = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
    }
    state = tree_map_only(DTensor, gathered, state)
    if writes:
        torch.save(state, path)
    trainer.strategy.barrier()


# ---------------------------------------------------------------------- a rank from begin to end


def measure_case(case: Case, settings: Settings, folder: str) -> dict[str, Any]:
    """Measures a case on this rank; plain values, seconds and bytes."""
    _prepare(case, settings)
    peak = PeakMemory(settings.device)
    blocks = Blocks(case, settings, peak)
    trainer = trainer_of(case, settings, blocks.updates, Path(folder), blocks)
    module = make_method(case, settings)
    try:
        trainer.fit(module, RandomData(settings, trainer.global_rank))
    except RuntimeError:
        if blocks.found["waits"] is None:
            raise
    if case.detailed and trainer.is_global_zero:
        blocks.found["plan"] = planned(case, settings)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return blocks.found


def _prepare(case: Case, settings: Settings) -> None:
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(settings.threads or max(1, (cores or 1) // case.ranks(settings)))
    pl.seed_everything(0, verbose=False)
    # A small step first, so that the libraries are there before memory is looked at.
    tiny = Settings(width=16, layers=1, size=8, batch=2)
    step = plain_step(plain_module(Case("single", COUNTERPART), tiny, torch.device("cpu")), case, 0)
    step(RandomData(tiny, 0).prepared[0], 0)


def planned(case: Case, settings: Settings) -> dict[str, Any]:
    """What `fewstep plan` says of a case: bytes a device, in all and by role."""
    strategy: PlannedStrategy = "fsdp2" if case.strategy == "fsdp2" else "ddp"
    module, data = make_method(case, settings), RandomData(settings, 0)
    plan = plan_of(module, data, case.ranks(settings), strategy, case.precision)
    roles = {r.role: {"weights": r.weights, "optimizer": r.optimizer} for r in plan.roles}
    return {"bytes": plan.total, "roles": roles}

"""Options of the trainer and the commands: what they ask for, and what nobody can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.errors import FewstepError, require_at_least
from lightning_modules.parallel import ShardedStrategy
from scripts.plan import Strategy

# Options of commands that say how many of something there are.
ONES = ("num_samples", "count", "trials", "devices", "replicas", "devices_per_node")
MAX_SEED = 2**32 - 1
# What would count on Lightning's own optimisation: values of no effect, and what has one here.
OURS = {
    "accumulate_grad_batches": ((None, 1), "model.init_args.accumulate"),
    "gradient_clip_val": ((None, 0), "model.init_args.gradient_clip"),
    "gradient_clip_algorithm": ((None,), "model.init_args.gradient_clip"),
}
# What a trainer is made with that only plans.
HERE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
}


def check_options(config: Any) -> None:
    """Looks at the numbers a command was given.

    Args:
        config: a command's parsed options.

    Raises:
        FewstepError: for steps, samples, seeds, devices or updates that there cannot be, and for
            options of the trainer that have no effect on these methods.
    """
    if any(steps < 1 for steps in config.get("steps") or ()):
        raise FewstepError(
            "--steps counts sampling steps and needs numbers of at least 1, not "
            f"{min(config.steps)}."
        )
    require_at_least(1, **{f"--{k}": config[k] for k in ONES if config.get(k) is not None})
    check_seeds("--seeds", config.get("seeds") or [])
    given = config.get("seed_everything")
    check_seeds("--seed_everything", [] if given in (None, True, False) else [given])
    _check_trainer(config.trainer)


def check_seeds(name: str, seeds: list[int]) -> None:
    """Refuses a seed that generators of random numbers do not take.

    Raises:
        FewstepError: naming it.
    """
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise FewstepError(f"{name} takes whole numbers from 0 to {MAX_SEED}, not {seed}.")


def _check_trainer(trainer: Any) -> None:
    for name, (harmless, ours) in OURS.items():
        if trainer.get(name) not in harmless:
            raise FewstepError(
                f"trainer.{name} has no effect here, as methods optimise their roles themselves. "
                f"Use {ours}."
            )
    for name in ("max_steps", "max_epochs"):
        if (trainer.get(name) or 0) < -1:
            raise FewstepError(
                f"trainer.{name} must be 0 or more, or -1 for no end, not {trainer.get(name)}."
            )
    if str(trainer.get("devices")) in ("0", "[]", ""):
        raise FewstepError(
            "trainer.devices must be at least 1, a list of devices, or auto; a run without a GPU "
            "takes --trainer.accelerator cpu --trainer.devices 1."
        )


def check_devices(trainer: Any) -> None:
    """Refuses a GPU that is not here.

    Raises:
        FewstepError: if the trainer is to run on one.
    """
    if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise FewstepError(
            f"trainer.accelerator is {trainer.get('accelerator')}, but torch finds no GPU on this "
            "machine. Use --trainer.accelerator cpu, or auto."
        )


def asked_for(trainer: Mapping[str, Any]) -> tuple[int, Strategy, int]:
    """How many devices a trainer's configuration asks for, and how roles live on them.

    The third is into how many groups, each with a copy of the sharded roles.
    """
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip("[]").split(",")
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count())
    else:
        count = int(devices)
    strategy = trainer.get("strategy")
    if isinstance(strategy, ShardedStrategy):
        return count * nodes, "fsdp2", strategy.replicas
    return count * nodes, "fsdp2" if strategy == "fsdp2" else "ddp", 1

"""How an exported pipeline is to be called, kept in its folder as plain JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.seeding import Generators

FILE_NAME = "fewstep.json"


@dataclass(frozen=True)
class Call:
    """What to tell an exported pipeline for one number of steps.

    Attributes:
        num_steps: sampling steps.
        arguments: of the pipeline's call, besides prompts, generators and outputs.
        visit: what the scheduler's ``set_timesteps`` must get where the call does not take it.
        times: the times the network is evaluated at, then the end.
    """

    num_steps: int
    arguments: dict[str, Any]
    visit: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)


def write_calls(folder: Path, calls: list[Call], record: dict[str, Any]) -> None:
    """Writes what other tools may read of an exported folder.

    Args:
        record: plain values that say where the student came from.
    """
    content = {"format": 1, **record, "calls": [asdict(call) for call in calls]}
    (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_calls(folder: Path) -> dict[int, Call]:
    """The calls of a folder that ``fewstep export`` wrote, by number of steps; of others, none.

    Raises:
        FewstepError: if they are damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    try:
        calls = [Call(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["calls"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewstepError(f"'{path}' is damaged; export the student again.") from error
    return {call.num_steps: call for call in calls}


@contextmanager
def visiting(scheduler: Any, times: Mapping[str, Any]) -> Iterator[None]:
    """Lets a pipeline's scheduler visit given times, where its call has no argument for them.

    Args:
        times: ``timesteps`` or ``sigmas`` for ``set_timesteps``; nothing leaves it as it is.
    """
    if not times:
        yield
        return
    original = scheduler.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        original(device=device, **times)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


@contextmanager
def drawing_from(scheduler: Any, generator: Generators) -> Iterator[None]:
    """Lets a scheduler draw from the generators of the call, where the pipeline hands it none."""
    original = getattr(scheduler, "step", None)
    if original is None or "generator" not in inspect.signature(original).parameters:
        yield
        return

    @wraps(original)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"generator": generator, **kwargs})

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step

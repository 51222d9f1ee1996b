"""Sharded checkpoints for runs that are not sharded, and whole ones for those that are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from fewstep.networks.damaged import damaged, reading
from fewstep.networks.loading import read_checkpoint
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder

NEEDED = {"state_dict", "pytorch-lightning_version"}  # of any checkpoint that Lightning restores


def read_whole(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as a single process would have written it.

    Optimiser states are named by parameter in the shards, and numbered here.

    Raises:
        FewstepError: if it is damaged.
    """
    state: dict[str, Any] = {}
    with reading(path):
        _load_state_dict(
            state,
            storage_reader=FileSystemReader(path),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
    names = sorted(name for name in state if name.startswith("optimizer_"))
    return {
        **read_remainder(path),
        "state_dict": state["state_dict"],
        "optimizer_states": [_numbered(state[name]) for name in names],
    }


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    order = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: position for position, name in enumerate(order)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_whole(
    path: Path, module: pl.LightningModule, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Loads a checkpoint file into a sharded module and its optimisers; returns all of it.

    Raises:
        FewstepError: if the file is damaged or of another experiment.
    """
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    parameters = dict(module.named_parameters())
    whole = checkpoint["state_dict"]
    placed = {
        name: _like(parameters[name], tensor) if name in parameters else tensor
        for name, tensor in whole.items()
    }
    module.load_state_dict(placed)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        order = [p for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {
            number: {key: _like(order[number], value) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        optimizer.load_state_dict(state)
    return checkpoint


def _like(parameter: Tensor, whole: Any) -> Any:
    """A whole tensor of a parameter's shape, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or getattr(whole, "shape", None) != parameter.shape:
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)


class WholeCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files, and reads sharded folders too."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a local file in place, and waits until the disk has it.

        Lightning's own makes a copy in memory and another in the folder for temporary files, which
        may be too small. Whoever asks for a name that is never half written gives another at
        first, as callbacks.Checkpoints does. Quotas of network disks are often told of only when
        the disk is asked to have it all.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads either kind.

        Raises:
            FewstepError: if it is no checkpoint, or damaged.
        """
        if is_sharded_checkpoint(Path(path)):
            return read_whole(Path(path))
        with reading(path):
            found = super().load_checkpoint(path, *args, **kwargs)
        if not isinstance(found, dict) or not found.keys() >= NEEDED:
            raise damaged(path)
        return found

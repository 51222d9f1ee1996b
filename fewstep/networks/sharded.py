"""Sharded checkpoints: folders of torch.distributed.checkpoint, read without any other process.

Such a folder is written by one's own runs. Its table of contents is a pickle, as torch defines it:
do not read one from a source you do not trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from fewstep.networks.damaged import reading

CONTENTS = ".metadata"
REMAINDER = "meta.pt"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether this is a whole sharded checkpoint: its contents and the remainder come last."""
    return path.is_dir() and (path / CONTENTS).is_file() and (path / REMAINDER).is_file()


def read_remainder(path: Path) -> dict[str, Any]:
    """What is not sharded: counters, metadata, positions.

    Raises:
        FewstepError: if the checkpoint is damaged.
    """
    with reading(path):
        found: dict[str, Any] = torch.load(path / REMAINDER, map_location="cpu", weights_only=True)
    return found


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with ``prefix``, by the rest of their names.

    Raises:
        FewstepError: if the checkpoint is damaged.
    """
    with reading(path):
        return _tensors(FileSystemReader(path), prefix)


def _tensors(reader: FileSystemReader, prefix: str) -> dict[str, Tensor]:
    contents = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in contents.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}

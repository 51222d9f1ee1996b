"""What a machine's memory must hold before roles are on its devices."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fewstep.networks.folders import TEXT_MODELS
from lightning_modules import FewStepModule


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one machine's own memory.

    Attributes:
        ranks: processes on the machine, one a device.
        building: all ranks' roles, which each builds whole and in float32, frozen ones too, before
            any is sharded or moved to its device.
        text: all ranks' text encoders, from the first prompt that is encoded on; they stay there if
            they are offloaded. None where the pipeline's folder does not tell.
    """

    ranks: int
    building: int
    text: int | None


def host_memory(model: FewStepModule, ranks: int) -> HostMemory:
    """What building a method takes on a machine of so many ranks.

    Args:
        model: with roles on the meta device.
        ranks: of them on the machine.
    """
    weights = sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    tables = sum(buffer.nbytes for buffer in model.buffers())
    text = None
    if model.companions is not None:
        numbers = text_parameters(model.companions.folder)
        text = None if numbers is None else ranks * numbers * model.companions.dtype.itemsize
    return HostMemory(ranks, ranks * (weights + tables), text)


def text_parameters(folder: Path) -> int | None:
    """Parameters of a pipeline's text encoders, by their files' headers; None without them.

    Of weights that are there in several precisions, one is counted.
    """
    total, parts = 0, [folder / name for name in TEXT_MODELS if name.startswith("text_encoder")]
    for part in filter(Path.is_dir, parts):
        files = sorted(part.glob("*.safetensors"))
        files = [file for file in files if ".fp16" not in file.name] or files
        try:
            total += sum(map(_numbers_in, files))
        except (OSError, SafetensorError):
            return None
    return total or None


def _numbers_in(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118

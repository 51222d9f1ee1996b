"""Tensors computed beforehand: latents of a VAE and embeddings of prompts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from datamodules.fields.base import Decoded, Field, Random


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """Reads an ``.npy`` file without copying; the array cannot be written to.

    Raises:
        ValueError: if it is damaged, holds objects (which would be pickles) or claims another size
            than it has.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    count = int(np.prod(shape, dtype=np.int64))
    if count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"it claims the shape {shape} of {dtype} but has another size")
    values = np.frombuffer(data, dtype, count, stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Reads a safetensors file from memory.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file: {error}") from error


class Latents(Field):
    """Latents ``(C, H, W)`` or ``(C, F, H, W)``, as a network sees them: ``(x - shift) * scale``.

    A part is an ``.npy`` with the latent, or a safetensors file with ``latent``, or with ``mean``
    and ``std``, from which training draws anew each epoch and evaluation takes the mean.

    Args:
        scale, shift: the VAE's scaling and shift factors, for latents stored as the VAE gave them.
        keys: see :class:`Field`.
    """

    def __init__(
        self,
        scale: float = 1.0,
        shift: float = 0.0,
        keys: Sequence[str] = ("latent.safetensors", "latent.npy", "npy"),
    ) -> None:
        super().__init__(keys)
        self.scale = scale
        self.shift = shift

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes, or draws, one latent."""
        if extension.endswith("npy"):
            return Decoded(read_npy(data))
        tensors = read_safetensors(data)
        if "latent" in tensors:
            return Decoded(tensors["latent"])
        if not {"mean", "std"} <= tensors.keys():
            raise ValueError(f"it has neither 'latent' nor 'mean' and 'std' but {sorted(tensors)}")
        mean, std = tensors["mean"].float(), tensors["std"].float()
        if random is None:
            return Decoded(mean)
        noise = random().standard_normal(tuple(mean.shape), dtype=np.float32)
        return Decoded(mean + std * torch.from_numpy(noise))

    def collate(self, values: list[Any]) -> Tensor:
        """Stacks arrays or tensors to ``(B, ...)``."""
        if isinstance(values[0], np.ndarray):
            return torch.from_numpy(np.stack(values))
        return torch.stack(values)

    def finish(self, values: Tensor) -> Tensor:
        """Scales, in float32."""
        return (values.float() - self.shift) * self.scale


class Tensors(Field):
    """Named tensors from a safetensors part, each of which becomes a condition of that name.

    Args:
        names: which of the part's tensors to take, and the backbone's argument each becomes; None
            takes all under their own names.
        keys: see :class:`Field`.
    """

    def __init__(
        self,
        names: dict[str, str] | None = None,
        keys: Sequence[str] = ("text.safetensors",),
    ) -> None:
        super().__init__(keys)
        self.names = names

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes to a dict of tensors."""
        tensors = read_safetensors(data)
        if self.names is None:
            return Decoded(tensors)
        missing = sorted(self.names.keys() - tensors.keys())
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}; it has {', '.join(sorted(tensors))}")
        return Decoded({argument: tensors[name] for name, argument in self.names.items()})

    def collate(self, values: list[Any]) -> dict[str, Tensor]:
        """Stacks each name's tensors to ``(B, ...)``."""
        return {name: torch.stack([value[name] for value in values]) for name in values[0]}

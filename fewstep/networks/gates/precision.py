"""A residual stream in float32 through a network whose branches compute in half precision.

A block's update of its stream is rounded to the branch's precision once; the stream itself, which
every block adds to, is never rounded. What makes it so are hooks: a block takes its streams in
float32, sums with them are float32 by promotion, layers with weights in half precision take what
they are given in that, and maps of the stream itself compute in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import argument_of, position_of
from fewstep.networks.gates.sites import LAYERS, Site, block_sites

HALVES = (torch.float16, torch.bfloat16)
STREAMS = "rdm_streams"  # the attribute in which a block keeps where its streams are
IN_FLOAT32 = "in_float32"  # of maps of a stream, whether they compute so
# These take what they are given in their weights' precision; norms add up in float32 inside.
CASTING = (
    *(*LAYERS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase),
)


class StreamLinear(nn.Linear):
    """A linear map of a stream itself, which where streams are kept so computes in float32.

    Unlike a branch, whose update is rounded once and added, it would round all of the stream.

    Attributes:
        in_float32: whether it does, under autocast and with weights in half precision too.
    """

    in_float32 = False

    def forward(self, input: Tensor) -> Tensor:
        """Args: ``input (..., C)``."""
        if not self.in_float32:
            return super().forward(input)
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


@dataclass(frozen=True)
class Place:
    """Where a block has a stream.

    Attributes:
        argument, position: among the arguments of its forward pass.
        output: in its output; None if it is that.
    """

    argument: str
    position: int
    output: int | None


def place_of(network: nn.Module, site: Site) -> Place:
    """Where the block of a site, one of :func:`block_sites`, has its stream."""
    assert site.stream is not None
    position = position_of(network.get_submodule(site.name), site.stream.argument)
    assert position is not None
    return Place(site.stream.argument, position, site.stream.output)


def with_argument(
    place: Place, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another stream."""
    if place.argument in kwargs:
        return args, {**kwargs, place.argument: value}
    return (*args[: place.position], value, *args[place.position + 1 :]), kwargs


def keep_streams_float32(network: nn.Module) -> None:
    """Lets the streams of all blocks that are known be float32, in place.

    Under autocast, and of a network in half precision. Blocks that change a stream's size or
    channels start another, which is float32 behind them.

    Raises:
        FewstepError: if no block of the network is known to keep its stream.
    """
    places: dict[str, list[Place]] = {}
    for site in block_sites(network):
        places.setdefault(site.name, []).append(place_of(network, site))
    if not places:
        raise FewstepError(
            f"gates.stream_dtype: no block of this {type(network).__name__} is known to keep its "
            "stream. Set it to same, or let the blocks say `residual_branches` and "
            "`residual_stream`."
        )
    for name, own in places.items():
        block: Any = network.get_submodule(name)
        setattr(block, STREAMS, tuple(own))
        block.register_forward_pre_hook(widen_streams, with_kwargs=True)
        block.register_forward_hook(check_streams)
    for module in network.modules():
        if isinstance(module, StreamLinear):
            module.in_float32 = True
        elif isinstance(module, CASTING):
            module.register_forward_pre_hook(narrow_input, with_kwargs=True)


def widen_streams(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a block: its streams in float32."""
    for place in block.rdm_streams:
        given = argument_of(place.argument, place.position, args, kwargs)
        if given is not None and given.dtype in HALVES:
            args, kwargs = with_argument(place, given.float(), args, kwargs)
    return args, kwargs


def check_streams(block: Any, _args: Any, output: Any) -> None:
    """Forward hook of a block, behind the one of its gate.

    Raises:
        FewstepError: if it rounds a stream, so that the option would be a word only.
    """
    for place in block.rdm_streams:
        given = output if place.output is None else output[place.output]
        if given.dtype in HALVES:
            raise FewstepError(
                f"gates.stream_dtype: a {type(block).__name__} gives its '{place.argument}' in "
                f"{str(given.dtype).removeprefix('torch.')}, though it took float32. Set it to "
                "same, or let this class add to its stream without casting."
            )


def narrow_input(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a layer: float32 in its weights' half precision.

    Autocast does so itself.
    """
    weight = next(_weights(layer), None)
    if weight is None or weight.dtype not in HALVES:
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None

    def narrowed(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(weight.dtype) if wide else value

    return tuple(map(narrowed, args)), {name: narrowed(value) for name, value in kwargs.items()}


def _weights(layer: nn.Module) -> Iterator[Tensor]:
    """A layer's own weights; those of its gate stay float32."""
    return (parameter for parameter in layer._parameters.values() if parameter is not None)

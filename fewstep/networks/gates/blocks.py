"""Residual blocks that are known: where their branches end and which of their tensors is a stream.

Classes are told by name, as those that checkpointing and sharding put in their place keep it. A
block of one's own says the same of itself, see :class:`ResidualBlock`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

Side = Literal["sample", "text"]


@runtime_checkable
class ResidualBlock(Protocol):
    """A block that says how it can be gated.

    Attributes:
        residual_branches: names of the last layer of each of its residual branches, linear or
            convolutional, relative to the block.
        residual_stream: name of the argument of its forward pass to which it adds, and which its
            output, a tensor of the same shape, takes the place of.
    """

    residual_branches: Sequence[str]
    residual_stream: str


@dataclass(frozen=True)
class Branch:
    """The last layer of a residual branch, and whose tokens it adds to."""

    layer: str
    side: Side = "sample"


@dataclass(frozen=True)
class Stream:
    """A tensor that a block adds to.

    Attributes:
        argument: its name among the arguments of the forward pass.
        last: the last layer that adds to it; a block without that layer leaves it alone.
        output: where the block's output has it; None if it is the output.
        side: the sample's tokens or the text's.
        channel_dim: which of its dimensions are channels, if not as in what that layer gives.
    """

    argument: str
    last: str
    output: int | None = None
    side: Side = "sample"
    channel_dim: int | None = None


@dataclass(frozen=True)
class Kind:
    """What is known of a class of blocks."""

    branches: tuple[Branch, ...]
    streams: tuple[Stream, ...]


def _crossed(feed_forward: str) -> Kind:
    """Attention to itself, attention to text where there is some, and a feed-forward network."""
    branches = (Branch("attn1.to_out.0"), Branch("attn2.to_out.0"), Branch(feed_forward))
    return Kind(branches, (Stream("hidden_states", feed_forward),))


JOINT = Kind(
    (
        *(Branch("attn.to_out.0"), Branch("attn.to_add_out", "text"), Branch("attn2.to_out.0")),
        *(Branch("ff.net.2"), Branch("ff_context.net.2", "text")),
    ),
    (
        Stream("hidden_states", "ff.net.2", 1),
        Stream("encoder_hidden_states", "ff_context.net.2", 0, "text"),
    ),
)
RESNET = Kind((Branch("conv2"),), (Stream("input_tensor", "conv2"),))
KINDS: dict[str, Kind] = {
    # Of U-Nets, motion modules, DiT, PixArt and Latte.
    "BasicTransformerBlock": _crossed("ff.net.2"),
    # Of Stable Video Diffusion, with a feed-forward network in front as well.
    "TemporalBasicTransformerBlock": Kind(
        (Branch("ff_in.net.2"), *_crossed("ff.net.2").branches), _crossed("ff.net.2").streams
    ),
    "LTXVideoTransformerBlock": _crossed("ff.net.2"),
    "WanTransformerBlock": _crossed("ffn.net.2"),
    "JointTransformerBlock": JOINT,
    "FluxTransformerBlock": JOINT,
    # Its one branch adds to both sides' tokens, one behind the other.
    "FluxSingleTransformerBlock": Kind(
        (Branch("proj_out"),),
        (
            Stream("hidden_states", "proj_out", 1),
            Stream("encoder_hidden_states", "proj_out", 0, "text"),
        ),
    ),
    "ResnetBlock2D": RESNET,
    "ResnetBlockCondNorm2D": RESNET,
    "TemporalResnetBlock": RESNET,
    "TemporalConvLayer": Kind((Branch("conv4.3"),), (Stream("hidden_states", "conv4.3"),)),
    # Of aMUSEd's U-ViT.
    "SkipFFTransformerBlock": Kind(
        (Branch("attn1.to_out.0"), Branch("attn2.to_out.0")),
        (Stream("hidden_states", "attn2.to_out.0"),),
    ),
    # It scales and shifts the sum, so that it keeps no stream.
    "ConvNextBlock": Kind((Branch("channelwise_linear_2"),), ()),
    # Only where it adds its input itself, as in U-Nets without text, whose maps it takes.
    "Attention": Kind((Branch("to_out.0"),), (Stream("hidden_states", "to_out.0", channel_dim=1),)),
}


def class_name(module: nn.Module) -> str:
    """The name of a module's class in the table, or its own."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return next((name for name in names if name in KINDS), names[0])


def kind_of(module: nn.Module) -> Kind | None:
    """What is known of a module as a residual block; None if it is none, or unknown."""
    if isinstance(module, ResidualBlock):
        branches = tuple(Branch(name) for name in module.residual_branches)
        return Kind(branches, (Stream(module.residual_stream, branches[-1].layer),))
    name = class_name(module)
    if name == "Attention" and not getattr(module, "residual_connection", False):
        return None
    return KINDS.get(name)


def keeps_its_stream(module: Any) -> bool:
    """Whether a block's output is its input and what it adds, so that its update can be gated.

    Not so where a resnet block changes the size or the channels, or divides the sum, or a block in
    time changes the channels.
    """
    if getattr(module, "is_res", True) is False or getattr(module, "up", False) is True:
        return False
    if getattr(module, "down", False) is True:
        return False
    divides = getattr(module, "output_scale_factor", getattr(module, "rescale_output_factor", 1))
    return getattr(module, "conv_shortcut", None) is None and divides == 1


def position_of(module: nn.Module, argument: str) -> int | None:
    """Where a module's forward pass takes an argument, None if it does not.

    The class that checkpointing puts in place of a block's takes anything; the block's own is
    below it.
    """
    for cls in type(module).__mro__:
        forward = vars(cls).get("forward")
        names = [] if forward is None else list(inspect.signature(forward).parameters)
        if argument in names:
            return names.index(argument) - 1
    return None


def argument_of(name: str, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a call, given by name or by position."""
    return kwargs[name] if name in kwargs else args[position]

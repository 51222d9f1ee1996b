"""Changing a network's depth: twice as many blocks of half the step or none, or fewer blocks.

A stack of gated blocks ``z <- z + alpha F(z) + beta`` is Euler's method for an ordinary
differential equation in the depth (Ma et al. 2024, arXiv 2406.13215, section 3; Chen et al. 2018).
Two blocks with half of alpha and beta each take the same way in two steps, so what a deeper network
computes differs by the error of one step alone. New blocks whose gates are zero change nothing.
How to do it is this project's choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks.gates.gate import Gate
from fewstep.networks.gates.gated import backbone_of, gate_spec, gates_of, is_gated, network_of
from fewstep.networks.gates.sites import FUSE, find_sites
from fewstep.networks.gates.spec import ResidualGates
from fewstep.networks.gates.starts import first_dead
from fewstep.networks.gates.streams import is_compiled, watched_streams

Item = TypeVar("Item")
NewBlocks = Literal["half", "zero"]


@dataclass(frozen=True)
class Stack:
    """Where a network keeps its blocks.

    Attributes:
        name: of the list of blocks, which are all alike, or of one kind in turn with another.
        fixed: how many of the first must stay, as the network uses parts of them elsewhere.
        option: the constructor's argument that says how many there are.
        turn: how many blocks it takes until they are of the first kind again; as many come and go
            together.
        fuses: of the list of maps that let a long skip into each block of the second half.
    """

    name: str
    fixed: int = 0
    option: str = "num_layers"
    turn: int = 1
    fuses: str | None = None


STACKS = {
    # It asks its first block for the embedding that its last layer needs.
    "DiTTransformer2DModel": Stack("transformer_blocks", fixed=1),
    "PixArtTransformer2DModel": Stack("transformer_blocks"),
    "LTXVideoTransformer3DModel": Stack("transformer_blocks"),
    "WanTransformer3DModel": Stack("blocks"),
    "VideoDiT": Stack("blocks"),
    "Latte": Stack("blocks", turn=2),  # across space and across time
    "UViT": Stack("blocks", fuses="fuses"),
}


def grow(model: nn.Module, new_blocks: NewBlocks = "half") -> int:
    """Doubles a gated network's depth, in place: each block becomes two.

    Do so before compiling, sharding and copying it. The new blocks have weights of their own, which
    start as those of the block they double. Blocks that take turns are doubled turn by turn. Where
    long skips join the halves, each comes from the second of two twins to the first of their
    mirror images, and the new skips between the other ones start as if they were not there.

    Args:
        model: a denoiser, a backbone or a network, every residual unit of which has an alpha.
        new_blocks: ``half`` halves the gates of both blocks. ``zero`` leaves the first as it is and
            starts the second with an alpha and beta of 0 and a rho of 1, as the identity (ReZero,
            Bachlechner et al. 2020): the network computes the same, to the bit.

    Returns:
        The new number of blocks.

    Raises:
        FewstepError: for networks whose blocks are unknown or not alike, that have been prepared
            for training, whose gates cannot halve a block's step, or whose new blocks could never
            learn from an alpha of zero, as what they would multiply is zero as well.
    """
    network, stack = _open(model)
    _check_growable(model)
    if new_blocks == "zero":
        _check_new_alive(model)
    blocks = _blocks(network, stack)
    if new_blocks == "half":
        _set_gates(blocks, 0.5)
    doubled = []
    for turn in _turns(blocks, stack):
        twins = copy.deepcopy(turn)
        if new_blocks == "zero":
            _set_gates(twins, 0.0)
        doubled += [*turn, *twins]
    if stack.fuses is not None:
        fuses = nn.ModuleList(
            _doubled(list(network.get_submodule(stack.fuses).children()), len(blocks))
        )
        setattr(network, stack.fuses, fuses)
    return _close(model, network, stack, doubled)


def prune(model: nn.Module, count: int, run: Callable[[], Any]) -> list[int]:
    """Takes away the blocks that add least to their stream, in place.

    The ratio of root mean squares of what a block adds and what it is given decides, gates and
    modulation included. It says what a block does to the stream, not how much that matters.

    Args:
        model: a denoiser, a backbone or a network, gated or not.
        count: how many blocks go; of blocks that take turns whole turns do.
        run: one forward pass of the model, on samples and times that stand for all.

    Returns:
        The numbers that the removed blocks had, in the network's order.

    Raises:
        FewstepError: for networks whose blocks are unknown or not alike, that have long skips or
            have been prepared for training, whose gates were chosen by name, or that have too few
            blocks; and if ``run`` does not run the network.
    """
    network, stack = _open(model)
    if stack.fuses is not None and list(network.get_submodule(stack.fuses).children()):
        raise FewstepError(
            f"No block of this {type(network).__name__} can be taken away: long skips join each to "
            "its mirror image. It works without (long_skips: false)."
        )
    if is_gated(model):
        _check_all_chosen(gate_spec(model), "loses blocks")
    blocks = _blocks(network, stack)
    least = max(stack.fixed, stack.turn)
    if not 0 < count <= len(blocks) - least or count % stack.turn:
        whole = f", {stack.turn} at a time" if stack.turn > 1 else ""
        raise FewstepError(
            f"{count} of the {len(blocks)} blocks of this {type(network).__name__} cannot be taken "
            f"away; {least} must stay, and at least one must go{whole}."
        )
    with torch.no_grad(), watched_streams(model) as streams:
        run()
    ratios = {norms.block: norms.ratio for norms in streams}
    names = [f"{stack.name}.{number}" for number in range(len(blocks))]
    if not ratios.keys() >= set(names):
        raise FewstepError("prune: `run` must call the model that is pruned, once and as a whole.")
    turns = _turns(list(range(stack.fixed, len(blocks))), stack)
    order = sorted(turns, key=lambda turn: sum(ratios[names[number]] for number in turn))
    removed = sorted(number for turn in order[: count // stack.turn] for number in turn)
    _close(model, network, stack, [b for i, b in enumerate(blocks) if i not in removed])
    return removed


def _open(model: nn.Module) -> tuple[nn.Module, Stack]:
    """The network and where its blocks are, if they may be changed."""
    network = network_of(model)
    names = [cls.__name__ for cls in type(network).__mro__]
    stack = next((STACKS[name] for name in names if name in STACKS), None)
    kind, reason = type(network).__name__, None
    if stack is None:
        known = ", ".join(STACKS)
        raise FewstepError(
            f"The depth of a {kind} cannot be changed: its blocks are not one stack of blocks that "
            f"are all alike, or are not known. It can be of {known}."
        )
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        reason = "is sharded"
    elif is_compiled(network):
        reason = "is compiled"
    elif any(hasattr(module, "lora_A") for module in network.modules()):
        reason = "has LoRA adapters"
    if reason is not None:
        raise FewstepError(
            f"The depth of this {kind} cannot be changed, as it {reason}; change that of a network "
            "as it was loaded."
        )
    return network, stack


def _check_growable(model: nn.Module) -> None:
    if not is_gated(model):
        raise FewstepError(
            "Only a gated network can grow: it needs an alpha that scales each block's step. Add "
            "gates first (apply_gates); with init: identity they change nothing."
        )
    spec = gate_spec(model)
    if not spec.has_alpha:
        raise FewstepError(f"Gates of mode {spec.mode} have no alpha that could scale a step.")
    _check_all_chosen(spec, "grows, and units without gates cannot be scaled")


def _check_new_alive(model: nn.Module) -> None:
    """Refuses new blocks of zeros where these could never move, as with ``init: zero``."""
    network = network_of(model)
    dead = first_dead(network, find_sites(network, gate_spec(model)))
    if dead is not None:
        raise FewstepError(
            f"New blocks with alpha at zero could never train {dead} is zero too, so the gradients "
            "of alpha, of that and of the branch are all exactly zero. Let new blocks take half of "
            "the step (--new-blocks half), or train the network first."
        )


def _check_all_chosen(spec: ResidualGates, change: str) -> None:
    """Refuses gates in places that a network of another depth would not be rebuilt with."""
    if spec.include is not None or spec.exclude is not None:
        raise FewstepError(
            "gates.include and gates.exclude name blocks by their numbers, which change when a "
            f"network {change}; gate all of them, or merge the gates first."
        )


@torch.no_grad()
def _set_gates(blocks: list[nn.Module], share: float) -> None:
    """Leaves a share of all gates' alpha, beta and difference of rho from 1."""
    for _, gate in (named for block in blocks for named in gates_of(block)):
        assert isinstance(gate, Gate)
        for parameter in gate.parameters():
            parameter.mul_(share)
        if gate.delta is not None:
            gate.delta.sub_(1 - share)  # share alpha - 1 is share (alpha - 1) - (1 - share)


def _turns(items: list[Item], stack: Stack) -> list[list[Item]]:
    """Items of blocks, those of a turn together."""
    return [items[i : i + stack.turn] for i in range(0, len(items), stack.turn)]


def _doubled(fuses: list[nn.Module], blocks: int) -> list[nn.Module]:
    """The fuse maps of twice as many blocks; the new ones pass the stream on as it is.

    An odd number has a block in the middle, whose twin becomes the first of the second half.
    """
    if not fuses:
        return []
    found = [_passing(fuses[0])] if blocks % 2 else []
    for fuse in fuses:
        found += [fuse, _passing(fuse)]
    return found


@torch.no_grad()
def _passing(fuse: nn.Module) -> nn.Module:
    """A fuse map of ``W [z, skip] + b`` with ``W = [1, 0]`` and ``b = 0``."""
    made = copy.deepcopy(fuse)
    for parameter in made.parameters():
        parameter.zero_()
    weight = made.get_submodule(FUSE).get_parameter("weight")
    weight[:, : len(weight)].fill_diagonal_(1)
    return made


def _blocks(network: nn.Module, stack: Stack) -> list[nn.Module]:
    return list(network.get_submodule(stack.name).children())


def _close(model: nn.Module, network: Any, stack: Stack, blocks: list[nn.Module]) -> int:
    """Puts the blocks in, and their number into all that the network is rebuilt from."""
    setattr(network, stack.name, nn.ModuleList(blocks))
    number = {stack.option: len(blocks)}
    if hasattr(network, "register_to_config"):
        network.register_to_config(**number)
    backbone = backbone_of(model)
    if backbone is not None and stack.option in backbone.config:
        backbone.config = {**backbone.config, **number}
    elif backbone is not None:
        backbone.config = {**backbone.config, "network": {**backbone.config["network"], **number}}
    return len(blocks)

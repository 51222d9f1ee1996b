"""What happens to a network's residual streams while it runs: how large they are, what blocks add.

Blocks are the ones that can be gated whole, gated or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import argument_of
from fewstep.networks.gates.gated import gates_of, is_gated, network_of
from fewstep.networks.gates.precision import Place, place_of
from fewstep.networks.gates.sites import Site, block_sites, branch_sites

Unit = tuple[str, str, bool]


@dataclass(frozen=True)
class Added:
    """What a gated unit adds to its block's stream, 0-dim tensors on their device.

    With ``r`` its ratio to the stream ``z`` and ``c`` this cosine, the sum of both has a squared
    norm of ``|z|^2 (1 + 2 r c + r^2)``: what is added turns the stream where the cosine is about
    0, and scales it where it is near 1 or -1.

    Attributes:
        rms: its root mean square.
        cosine: of the angle between it and what the block is given, each as one vector; 0 if one
            of them is zero. None where their shapes do not say which entries belong together.
    """

    rms: Tensor
    cosine: Tensor | None


@dataclass
class StreamNorms:
    """A stream at a block in the first pass that was watched, 0-dim tensors on its device.

    Attributes:
        block: the block's name in the network.
        side: the sample's tokens or the text's.
        stream: root mean square of what the block is given.
        update: that of what it adds, gates included.
        after: root mean square of what the block gives.
        gradient: root mean square of the loss's gradient by what it is given; None where none came.
        gradient_after: that by what it gives.
        added: what each of its gated units adds to this stream, by the name of the layer or block
            with the gate. Of a block with one branch it is ``update``, modulation included; of
            several branches it is what their gates give, before the block's own modulation.
    """

    block: str
    side: str
    stream: Tensor
    update: Tensor
    after: Tensor
    gradient: Tensor | None = None
    gradient_after: Tensor | None = None
    added: dict[str, Added] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """What the block adds, relative to what it is given; waits for the device."""
        return (self.update / self.stream).item()

    def ratio_of(self, unit: str) -> float | None:
        """What one of its units adds, relative to what the block is given; waits for the device."""
        return (self.added[unit].rms / self.stream).item() if unit in self.added else None

    def cosine_of(self, unit: str) -> float | None:
        """The cosine of the same; None if it is not known. Waits for the device."""
        cosine = self.added[unit].cosine if unit in self.added else None
        return None if cosine is None else cosine.item()


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or part of it is compiled, and so takes no notice of new hooks."""
    named = type(model).__name__ == "OptimizedModule"
    return named or any(module._compiled_call_impl is not None for module in model.modules())


def check_not_compiled(model: nn.Module) -> None:
    """Refuses networks whose blocks do not let anyone look inside.

    Raises:
        FewstepError: if it is compiled.
    """
    if is_compiled(model):
        raise FewstepError(
            f"This {type(network_of(model)).__name__} is compiled, and blocks of a compiled "
            "network cannot be watched; measure one that is not (compile_blocks: false)."
        )


@contextmanager
def watched_streams(model: nn.Module, with_gradient: bool = False) -> Iterator[list[StreamNorms]]:
    """Watches the blocks' streams in forward passes and, later on, their backward passes.

    Nothing is synchronised and no other rank is asked. Of each block its first pass counts, so that
    micro-batches and recomputed activations add nothing.

    Args:
        model: a denoiser, a backbone or a network.
        with_gradient: passes without gradient do not count, such as those that make a target; of
            the one that does, the gradient is noted when the backward pass comes.

    Yields:
        the streams, filled as the network runs, in the order in which it runs them.

    Raises:
        FewstepError: if the network is compiled.
    """
    network = network_of(model)
    check_not_compiled(model)
    found: list[StreamNorms] = []
    watches: dict[str, _Watch] = {}
    for site in block_sites(network):
        watch = watches.setdefault(site.name, _Watch(site.name, found, with_gradient))
        watch.places.append((site, place_of(network, site)))
    units = _gated_units(network, watches)
    handles = []
    for name, watch in watches.items():
        watch.units = units[name]
        block = network.get_submodule(name)
        handles.append(block.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(block.register_forward_hook(watch.leave, with_kwargs=True))
        handles += [
            network.get_submodule(layer).register_forward_hook(partial(watch.note_branch, layer))
            for layer, _, alone in watch.units
            if not alone
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def gate_places(model: nn.Module) -> dict[str, tuple[str, str] | None]:
    """Which stream each gate is of, in the network's order: its block's name and the side.

    None of gates of long skips and of layers that end no branch that is known.
    """
    network = network_of(model)
    sites = [*branch_sites(network), *block_sites(network)]
    places = {f"{site.name}.{site.gate}": (site.block, site.side) for site in sites}
    return {name: places.get(name) for name, _ in gates_of(network)}


def _gated_units(network: nn.Module, blocks: Mapping[str, Any]) -> dict[str, list[Unit]]:
    """The gated units of each block: the layer or block, its side, and if it adds all by itself."""
    units: dict[str, list[Unit]] = {name: [] for name in blocks}
    if not is_gated(network):  # its layers may be of any kind then
        return units
    count = Counter[tuple[str, str]]((s.block, s.side) for s in branch_sites(network))
    for gate, place in gate_places(network).items():
        if place is None or place[0] not in units:
            continue
        name = gate.rpartition(".")[0]
        units[place[0]].append((name, place[1], name == place[0] or count[place] == 1))
    return units


class _Watch:
    """The hooks of a block and its gated layers, behind those of gates.

    Attributes:
        places: the block's streams.
        units: its gated units, see :func:`_gated_units`.
        given: its streams by side, while it runs a pass that counts.
        added: what branches added to them in that pass.
    """

    def __init__(self, block: str, found: list[StreamNorms], with_gradient: bool) -> None:
        self.block = block
        self.found = found
        self.with_gradient = with_gradient
        self.places: list[tuple[Site, Place]] = []
        self.units: list[Unit] = []
        self.given: dict[str, Tensor] = {}
        self.added: dict[str, Added] = {}

    def enter(self, _block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the block."""
        skipped = self.with_gradient and not torch.is_grad_enabled()
        if skipped or any(norms.block == self.block for norms in self.found):
            return
        self.given = {
            site.side: argument_of(place.argument, place.position, args, kwargs)
            for site, place in self.places
        }

    def note_branch(
        self, layer: str, _layer: nn.Module, _args: Sequence[Any], output: Tensor
    ) -> None:
        """Forward hook of a layer that ends one of several branches."""
        side = next(side for name, side, _ in self.units if name == layer)
        if side in self.given:
            self.added[layer] = _added(output.detach().float(), self.given[side].detach().float())

    def leave(
        self, _block: nn.Module, _args: Sequence[Any], _kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Forward hook of the block."""
        for site, place in self.places if self.given else ():
            before = self.given[site.side]
            after: Tensor = output if place.output is None else output[place.output]
            known, given = before.detach().float(), after.detach().float()
            whole = _added(given - known, known)
            own = [(name, alone) for name, side, alone in self.units if side == site.side]
            added = {name: whole if alone else self.added[name] for name, alone in own}
            norms = StreamNorms(
                site.name, site.side, _rms(known), whole.rms, _rms(given), added=added
            )
            self.found.append(norms)
            if self.with_gradient and before.requires_grad:
                before.register_hook(partial(_note_gradient, norms, "gradient"))
            if self.with_gradient and after.requires_grad:
                after.register_hook(partial(_note_gradient, norms, "gradient_after"))
        self.given, self.added = {}, {}


def _added(update: Tensor, stream: Tensor) -> Added:
    like = _folded_like(stream, update)
    if like is None:
        return Added(_rms(update), None)
    return Added(_rms(update), F.cosine_similarity(update.flatten(), like.flatten(), dim=0))


def _folded_like(stream: Tensor, update: Tensor) -> Tensor | None:
    """A stream in the shape of what is added to it; None if that leaves a choice, or cannot be.

    Blocks across space or time fold the other of both, ``(B, F, N, C)``, into the batch.
    """
    ways = [stream]
    if stream.ndim == 4 and update.ndim == 3:
        ways = [stream.flatten(0, 1), stream.transpose(1, 2).flatten(0, 1)]
    fitting = [way for way in ways if way.shape == update.shape]
    return fitting[0] if len(fitting) == 1 else None


def _note_gradient(norms: StreamNorms, name: str, gradient: Tensor) -> None:
    if getattr(norms, name) is None:
        setattr(norms, name, _rms(gradient.detach().float()))


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()

"""What happens to a network's residual streams while it runs: how large they are, what blocks add.

Blocks are the ones that can be gated whole, gated or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import argument_of
from fewstep.networks.gates.gated import gates_of, network_of
from fewstep.networks.gates.precision import Place, place_of
from fewstep.networks.gates.sites import Site, block_sites, branch_sites


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
    """

    block: str
    side: str
    stream: Tensor
    update: Tensor
    after: Tensor
    gradient: Tensor | None = None
    gradient_after: Tensor | None = None

    @property
    def ratio(self) -> float:
        """What the block adds, relative to what it is given; waits for the device."""
        return (self.update / self.stream).item()


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
    blocks: dict[str, list[tuple[Site, Place]]] = {}
    for site in block_sites(network):
        blocks.setdefault(site.name, []).append((site, place_of(network, site)))
    handles = [
        network.get_submodule(name).register_forward_hook(
            partial(_note, found, sites, with_gradient), with_kwargs=True
        )
        for name, sites in blocks.items()
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


def _note(
    found: list[StreamNorms],
    sites: Sequence[tuple[Site, Place]],
    with_gradient: bool,
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
) -> None:
    """Forward hook of a block, behind the one of its gate."""
    skipped = with_gradient and not torch.is_grad_enabled()
    if skipped or any(norms.block == sites[0][0].name for norms in found):
        return
    for site, place in sites:
        before: Tensor = argument_of(place.argument, place.position, args, kwargs)
        after: Tensor = output if place.output is None else output[place.output]
        known, given = before.detach().float(), after.detach().float()
        update = _rms(given - known)
        norms = StreamNorms(site.name, site.side, _rms(known), update, _rms(given))
        found.append(norms)
        if with_gradient and before.requires_grad:
            before.register_hook(partial(_note_gradient, norms, "gradient"))
        if with_gradient and after.requires_grad:
            after.register_hook(partial(_note_gradient, norms, "gradient_after"))


def _note_gradient(norms: StreamNorms, name: str, gradient: Tensor) -> None:
    if getattr(norms, name) is None:
        setattr(norms, name, _rms(gradient.detach().float()))


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()

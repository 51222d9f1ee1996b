"""How much each residual unit amplifies: its Jacobian times a random direction.

A unit here is a block with its gates, as a map of its sample's stream: ``z -> rho z + alpha F(z) +
beta``, whose Jacobian is ``rho I + alpha J``. Of gates on branches, a block of two of them has the
product of two such factors. Forward-mode differentiation gives the product with a direction ``v``
together with the block's output, and its result can be differentiated by the weights and the gates
as any other.

What is needed for that: attention and norms in plain operations, which they are given for the
length of a call (:mod:`fewstep.networks.gates.plain`), blocks that are not compiled, and
activations of these calls that are kept rather than recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import argument_of
from fewstep.networks.gates.gated import network_of
from fewstep.networks.gates.plain import PlainOperations
from fewstep.networks.gates.precision import Place, place_of, with_argument
from fewstep.networks.gates.sites import block_sites
from fewstep.networks.gates.streams import check_not_compiled


@dataclass(frozen=True)
class UnitCall:
    """A unit as it is called in a forward pass.

    Attributes:
        block: the unit.
        place: where its stream is.
        args, kwargs: what it is called with, without gradient.
    """

    block: nn.Module
    place: Place
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def stream(self) -> Tensor:
        """``z``, what the unit adds to."""
        found: Tensor = argument_of(
            self.place.argument, self.place.position, self.args, self.kwargs
        )
        return found

    def __call__(self, stream: Tensor) -> Tensor:
        """The unit's output for another stream, all else being as it was."""
        args, kwargs = with_argument(self.place, stream, self.args, dict(self.kwargs))
        output = self.block(*args, **kwargs)
        found: Tensor = output if self.place.output is None else output[self.place.output]
        return found


def units_of(model: nn.Module) -> dict[str, Place]:
    """A network's units by name, in its order: blocks that keep their sample's stream."""
    network = network_of(model)
    return {
        site.name: place_of(network, site) for site in block_sites(network) if site.side == "sample"
    }


@contextmanager
def measured_units(
    model: nn.Module, names: Collection[str], direction: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Measures units while the network runs, of each its first call with gradient.

    Within the network's own pass, as only there all weights of a sharded one are whole.

    Args:
        model: a denoiser, a backbone or a network.
        names: of the units, see :func:`units_of`.
        direction: gives a ``v`` for a unit's stream, see :func:`amplification`. It is asked in the
            order in which the network runs its units.

    Yields:
        each unit's amplification ``(B,)``, filled as the network runs.

    Raises:
        FewstepError: if the network is compiled.
    """
    network = network_of(model)
    check_not_compiled(model)
    found: list[Tensor] = []
    seen: set[str] = set()

    def note(name: str, place: Place, block: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if torch.is_grad_enabled() and name not in seen:
            seen.add(name)  # before the unit is called once more
            kept, named = tree_map(_detached, (args, dict(kwargs)))
            call = UnitCall(block, place, kept, named)
            found.append(amplification(call, direction(call.stream)))

    handles = [
        network.get_submodule(name).register_forward_hook(
            partial(note, name, place), with_kwargs=True
        )
        for name, place in units_of(model).items()
        if name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def amplification(call: UnitCall, direction: Tensor) -> Tensor:
    """``|(rho I + alpha J) v| / |v|`` of each row of a unit's stream, with a graph.

    Args:
        call: of the unit.
        direction: ``v``, in the shape of its stream ``(B, ...)`` or one row of it ``(...)``.

    Returns:
        ``(B,)`` in float32, or float64 of networks in that. Its graph leads to the unit's own
        weights and gates, not to what is in front of the unit.

    Raises:
        FewstepError: if a layer of the unit has no forward derivative.
    """
    stream = call.stream
    v = direction.to(stream.dtype).expand_as(stream).contiguous()
    try:
        with forward_ad.dual_level(), PlainOperations():
            output = call(forward_ad.make_dual(stream, v))
            primal, tangent = forward_ad.unpack_dual(output)
    except NotImplementedError as error:
        raise FewstepError(
            f"The sensitivity of a {type(call.block).__name__} needs a forward derivative that one "
            f"of its layers lacks ({str(error).strip().splitlines()[0]}). Set sensitivity.weight: "
            "0; sensitivity.gate_weight needs no derivatives."
        ) from error
    if tangent is None:
        tangent = torch.zeros_like(primal)
    # Sharded weights are gathered for the backward pass once gradient reaches a unit's output;
    # times zero, it does so here, before it reaches the tangent's part of the unit.
    unread = 0 * _row_norms(primal)
    return _row_norms(tangent) / _row_norms(v) + unread


def _row_norms(tensor: Tensor) -> Tensor:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return torch.linalg.vector_norm(wide.flatten(1), dim=1)


def unevenness(amplifications: Sequence[Tensor]) -> Tensor:
    """``mean (log(|(rho I + alpha J) v| / |v|))^2`` over units and rows: 0 where none amplifies."""
    return torch.stack([rows.log().square().mean() for rows in amplifications]).mean()


def carries_tangent(*values: Any) -> bool:
    """Whether one of these is a tensor with a forward derivative, which is lost if recomputed.

    None is in compiled blocks, which are not measured.
    """
    return not torch.compiler.is_compiling() and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    )

"""How sensitive a network is to its depth: what its streams grow to, and its gradients.

With ``s`` the loss's gradient by the stream, a block ``z <- rho z + alpha F(z) + beta`` sends it
back as ``s <- (rho I + alpha J)^T s``, ``J`` being the Jacobian of ``F``. So alpha and rho alone
decide how much larger the gradient at the first block is than at the last. (The adjoint method of
Chen et al. 2018 on the residual ODE of Ma et al. 2024, arXiv 2406.13215.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import Side
from fewstep.networks.gates.gate import Gate
from fewstep.networks.gates.gated import gates_of, network_of
from fewstep.networks.gates.shards import sum_of_shards
from fewstep.networks.gates.streams import StreamNorms, gate_places, watched_streams


@dataclass(frozen=True)
class Sensitivity:
    """A stream from the first block that has it to the last, ``z_0`` to ``z_L``.

    Attributes:
        growth: ``|z_L| / |z_0|``.
        amplification: ``|dL/dz_0| / |dL/dz_L|``; None where no gradient came.

    Both are of root mean squares, which are to each other as norms where a stream keeps its shape.
    """

    growth: float
    amplification: float | None


def sensitivity(streams: Sequence[StreamNorms], side: Side = "sample") -> Sensitivity:
    """What a pass through a network says of its sensitivity; waits for the device.

    Args:
        streams: as :func:`~fewstep.networks.gates.streams.watched_streams` yields them.
        side: which tokens' stream.

    Raises:
        FewstepError: if no block was seen.
    """
    own = [norms for norms in streams if norms.side == side]
    if not own:
        raise FewstepError(
            "No block was seen whose stream is known. Run the network within `watched_streams`, "
            "and let blocks of your own say `residual_branches` and `residual_stream`."
        )
    first, last = own[0], own[-1]
    amplification = None
    if first.gradient is not None and last.gradient_after is not None:
        amplification = (first.gradient / last.gradient_after).item()
    return Sensitivity((last.after / first.stream).item(), amplification)


def measure(model: nn.Module, loss: Callable[[], Tensor]) -> Sensitivity:
    """A network's sensitivity in one forward and backward pass.

    Args:
        model: a denoiser, a backbone or a network, gated or not; not compiled.
        loss: runs the model, and gives a scalar with a graph. Gradients are left behind in whatever
            of it requires them.

    Raises:
        FewstepError: if the network is compiled, or none of its blocks is known.
    """
    with watched_streams(model, with_gradient=True) as streams:
        loss().backward()
    return sensitivity(streams)


def alpha_gates(model: nn.Module) -> list[list[Gate]]:
    """A network's gates with an alpha, those that add to the same stream together.

    Raises:
        FewstepError: if there are none.
    """
    sides: dict[str, list[Gate]] = {}
    places = gate_places(model)
    for name, gate in gates_of(network_of(model)):
        if isinstance(gate, Gate) and gate.delta is not None:
            place = places[name]
            sides.setdefault("sample" if place is None else place[1], []).append(gate)
    if not sides:
        raise FewstepError(
            f"This {type(network_of(model)).__name__} has no gates with an alpha. Set `gates`, in "
            "a mode that has one."
        )
    return list(sides.values())


def gate_excess(streams: Sequence[Sequence[Gate]]) -> Tensor:
    """``sum max(0, alpha^2 n - 1)`` over gates, with a graph; ``n`` of them add to one stream.

    Zero where gates start with ``init: depth`` and as long as none grows beyond that. Alpha's mean
    square counts of gates with one a channel; what the time adds to alpha does not. A collective,
    one for all gates, if they are sharded.

    Args:
        streams: see :func:`alpha_gates`.
    """
    deltas = [cast(Tensor, gate.delta) for own in streams for gate in own]
    sums = torch.stack([(1 + _local(d)).square().sum() / d.numel() for d in deltas])
    if isinstance(deltas[0], DTensor):
        sums = sum_of_shards(sums, deltas[0])
    parts = sums.split([len(own) for own in streams])
    return torch.cat([torch.relu(part * len(part) - 1) for part in parts]).sum()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``, in float64; waits for the device."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()

"""A penalty on residual units that amplify, so that depth stays trainable."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.gate import Gate
from fewstep.networks.gates.jacobian import measured_units, unevenness, units_of
from fewstep.networks.gates.sensitivity import alpha_gates, gate_excess
from fewstep.seeding import derived_seed
from lightning_modules.roles import run_seed

STREAM = "sensitivity"  # of random numbers


@dataclass(frozen=True)
class SensitivityPenalty:
    """What is added to a loss to keep gradients of about the same size at all depths.

    With ``J`` the Jacobian of a residual unit's branch and random directions ``v``, the mean over
    some units of ``(log(|(rho I + alpha J) v| / |v|))^2``, which is zero where a unit neither
    amplifies nor damps. A unit is a block with its gates, if it has some. Its gradient trains the
    unit itself and nothing in front of it. This is the project's own; Neural Residual Diffusion
    (arXiv 2406.13215) argues by the sensitivity and has no such term that is known.

    Args:
        weight: of that mean; 0 leaves it out.
        every: updates from one to the next that has it.
        units: how many units it takes, anew each time and the same on all ranks. One costs about
            as much as three of its forward passes, with attention in plain matrix products, which
            keep a matrix of tokens by tokens. In bfloat16 it knows an amplification to about 0.4 %.
        gate_weight: of ``sum max(0, alpha^2 n - 1)`` over the ``n`` gates of a stream, which costs
            next to nothing and is added at every update; 0 leaves it out. What the time adds to
            alpha is not in it.

    Raises:
        FewstepError: for numbers that make no sense.
    """

    weight: float = 0.0
    every: int = 50
    units: int = 4
    gate_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.gate_weight < 0:
            raise FewstepError("sensitivity.weight and sensitivity.gate_weight cannot be negative.")
        if self.every < 1 or self.units < 1:
            raise FewstepError(
                "sensitivity.every and sensitivity.units must be at least 1, not "
                f"{self.every} and {self.units}."
            )

    def check(self, student: nn.Module, compiled: bool) -> list[list[Gate]]:
        """Refuses networks on which it would have nothing to say.

        Returns:
            The gates that ``gate_weight`` is about, which :meth:`added_to` needs; none without.

        Raises:
            FewstepError: if there are no units, no gates with an alpha, or blocks are compiled.
        """
        gates = alpha_gates(student) if self.gate_weight else []
        if self.weight and not units_of(student):
            raise FewstepError(
                "sensitivity.weight: no block of this network is known to keep its stream. Let its "
                "blocks say `residual_branches` and `residual_stream`, or set the weight to 0."
            )
        if self.weight and compiled:
            raise FewstepError(
                "sensitivity.weight looks inside of blocks, which compiled ones do not allow. Set "
                "compile_blocks: false, or sensitivity.gate_weight instead."
            )
        return gates

    @contextmanager
    def watching(
        self, student: nn.Module, update: int, generator: Callable[[str, int], torch.Generator]
    ) -> Iterator[Sequence[Tensor]]:
        """Measures this update's units in the student's forward pass.

        Args:
            student: the network.
            update: number of the update; its units and directions depend on it and on the run's
                seed alone, so they are the same for all samples, on however many ranks.
            generator: makes the random numbers of a stream and an update, on the device.

        Yields:
            what :meth:`added_to` needs; nothing in validation, and where it is not this update's
            turn.
        """
        if not self.weight or update % self.every or not torch.is_grad_enabled():
            yield ()
            return
        names = list(units_of(student))
        chooser = random.Random(derived_seed(run_seed(), STREAM, update))
        chosen = chooser.sample(names, min(self.units, len(names)))
        numbers = generator(STREAM, update)

        def direction(stream: Tensor) -> Tensor:
            return torch.randn(stream.shape[1:], generator=numbers, device=stream.device)

        with measured_units(student, chosen, direction) as found:
            yield found

    def added_to(
        self, loss: Tensor, gates: Sequence[Sequence[Gate]], measured: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with the penalty, and the penalty's terms without their weights.

        Args:
            loss: scalar with a graph.
            gates: what :meth:`check` has found.
            measured: what :meth:`watching` has measured.
        """
        terms: dict[str, Tensor] = {}
        if measured:
            terms["sensitivity"] = unevenness(measured)
            loss = loss + self.weight * terms["sensitivity"]
        if self.gate_weight and torch.is_grad_enabled():
            terms["gate_excess"] = gate_excess(gates)
            loss = loss + self.gate_weight * terms["gate_excess"]
        return loss, terms

"""Growth, amplification and the gates' excess, against closed forms; and the ODE behind them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import ResidualGates, apply_gates, gates_of
from fewstep.networks.gates.sensitivity import (
    alpha_gates,
    gate_excess,
    measure,
    relative_error,
    sensitivity,
)
from fewstep.networks.gates.streams import watched_streams

WIDTH = 6


class Unit(nn.Module):
    """``z + W tanh(V z)``, or ``z + W z``."""

    residual_branches = ("last",)
    residual_stream = "z"

    def __init__(self, curved: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH) if curved else nn.Identity()
        self.last = nn.Linear(WIDTH, WIDTH, bias=curved)
        self.curved = curved

    def branch(self, z: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(z)) if self.curved else z)
        return found

    def forward(self, z: Tensor) -> Tensor:
        return z + self.branch(z)


def copies(unit: Unit, depth: int) -> nn.Sequential:
    """As many units, all alike."""
    units = [Unit(unit.curved).double() for _ in range(depth)]
    for other in units:
        other.load_state_dict(unit.state_dict())
    return nn.Sequential(*units)


def test_a_linear_stack_is_measured_as_its_matrix_says() -> None:
    torch.manual_seed(0)
    unit = Unit(curved=False).double()
    network = copies(unit, 5)
    apply_gates(network, ResidualGates(mode="alpha", init="depth"))
    z, projection = torch.randn(2, 3, WIDTH).double().unbind()
    z.requires_grad_(True)

    def loss() -> Tensor:
        found: Tensor = (network(z) * projection).sum()
        return found

    found = measure(network, loss)
    step = torch.eye(WIDTH).double() + unit.last.weight.detach() / math.sqrt(5)
    way = torch.linalg.matrix_power(step, 5)
    grown = (z @ way.T).norm() / z.norm()
    amplified = (projection @ way).norm() / projection.norm()
    assert found.growth == pytest.approx(grown.item(), rel=1e-5)
    assert found.amplification == pytest.approx(amplified.item(), rel=1e-5)
    assert found.growth != pytest.approx(found.amplification, rel=1e-3)
    with torch.no_grad(), watched_streams(network) as streams:
        network(z)
    assert sensitivity(streams).amplification is None


def test_what_was_not_run_has_no_sensitivity() -> None:
    with pytest.raises(FewstepError, match="No block was seen"):
        measure(nn.Linear(2, 2), lambda: nn.Linear(2, 2)(torch.ones(2)).sum())


def test_a_relative_error_is_one_of_norms() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted + torch.tensor([0.0, 0.5]), wanted) == pytest.approx(0.1)


def test_the_excess_of_gates_is_what_is_beyond_their_start_by_depth() -> None:
    network = DiT(8, 3, num_layers=2)
    apply_gates(network, ResidualGates(mode="alpha", init="depth"))
    gates = [gate for _, gate in gates_of(network)]
    assert gate_excess(alpha_gates(network)).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        gates[0].get_parameter("delta").fill_(-0.25)  # 4 * 0.75^2 - 1 = 1.25
        gates[1].get_parameter("delta").fill_(-0.99)
    excess = gate_excess(alpha_gates(network))
    assert excess.item() == pytest.approx(1.25, rel=1e-6)
    excess.backward()
    slopes = [gate.get_parameter("delta").grad for gate in gates[:2]]
    assert slopes[0].item() == pytest.approx(2 * 4 * 0.75, rel=1e-6)
    assert slopes[1].item() == 0
    with pytest.raises(FewstepError, match="no gates with an alpha"):
        alpha_gates(DiT(8, 3, num_layers=1))


# ------------------------------------------------------------ the ODE, of which a stack is a solver


@pytest.mark.slow
def test_the_error_of_a_stack_is_of_first_order_in_its_step() -> None:
    torch.manual_seed(0)
    unit = Unit(curved=True).double()
    z = torch.randn(8, WIDTH).double()

    def output(depth: int) -> Tensor:
        network = copies(unit, depth)
        apply_gates(network, ResidualGates(mode="alpha", init="ode"))
        with torch.no_grad():
            found: Tensor = network(z)
        return found

    fine = [output(depth) for depth in (1024, 2048)]
    exact = 2 * fine[1] - fine[0]  # Richardson's extrapolation
    errors = [relative_error(output(depth), exact) for depth in (8, 16, 32, 64, 128)]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2] * 4, rel=0.08)


def adjoint_by_itself(unit: Unit, z: Tensor, s: Tensor, steps: int) -> Tensor:
    """``ds/dtau = -J^T s`` back from ``s(1)``, along ``dz/dtau = F(z)``, by fourth-order steps."""

    def field(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        output, back = torch.func.vjp(unit.branch, state[0])
        return output, -back(state[1])[0]

    def moved(state: tuple[Tensor, Tensor], h: float) -> tuple[Tensor, Tensor]:
        def by(slope: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
            return (state[0] + share * slope[0], state[1] + share * slope[1])

        a = field(state)
        b = field(by(a, h / 2))
        c = field(by(b, h / 2))
        d = field(by(c, h))
        mean = [(w + 2 * x + 2 * y + z) / 6 for w, x, y, z in zip(a, b, c, d, strict=True)]
        return by((mean[0], mean[1]), h)

    state = (z, torch.zeros_like(z))
    for _ in range(steps):
        state = moved(state, 1 / steps)
    state = (state[0], s)
    for _ in range(steps):
        state = moved(state, -1 / steps)
    torch.testing.assert_close(state[0], z, rtol=1e-7, atol=1e-7)  # it came back
    return state[1]


def test_backpropagation_through_a_stack_tends_to_the_adjoint_equation() -> None:
    torch.manual_seed(0)
    unit = Unit(curved=True).double().requires_grad_(False)
    z, s = torch.randn(2, 4, WIDTH).double().unbind()
    exact = adjoint_by_itself(unit, z, s, 100)
    errors = []
    for depth in (8, 32, 128):
        network = copies(unit, depth)
        apply_gates(network, ResidualGates(mode="alpha", init="ode"))
        leaf = z.clone().requires_grad_(True)
        (found,) = torch.autograd.grad((network(leaf) * s).sum(), leaf)
        errors.append(relative_error(found, exact))
    assert errors[0] < 0.2
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([4] * 2, rel=0.15)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_no_gradient_grows_beyond_the_logarithmic_norm(alpha: float) -> None:
    # |exp(alpha K)| <= exp(alpha mu(K)), with mu the largest eigenvalue of (K + K^T) / 2.
    torch.manual_seed(0)
    unit = Unit(curved=False).double()
    nn.init.normal_(unit.last.weight, std=WIDTH**-0.5)
    depth = 1024
    network = copies(unit, depth)
    apply_gates(network, ResidualGates(mode="alpha"))
    with torch.no_grad():
        for _, gate in gates_of(network):
            gate.get_parameter("delta").fill_(alpha / depth - 1)
    matrix = unit.last.weight.detach()
    bound = (alpha * torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]).exp().item()
    exact = torch.linalg.matrix_norm(torch.matrix_exp(alpha * matrix), 2).item()
    z = torch.eye(WIDTH).double()
    with torch.no_grad():
        stack = torch.linalg.matrix_norm(network(z), 2).item()
    assert stack == pytest.approx(exact, rel=0.02)
    assert 1 < exact <= bound
    assert stack <= bound * 1.01

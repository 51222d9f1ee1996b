"""The mathematics of gates, in float64, on blocks that say themselves how they are gated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import VPSchedule
from fewstep.networks.gates import ResidualGates, apply_gates, gates_of
from fewstep.networks.gates.time import at, time_features

WIDTH = 6


class Unit(nn.Module):
    """``z + last(tanh(first(z)))``."""

    residual_branches = ("last",)
    residual_stream = "z"

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, width)

    def branch(self, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(z)))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.branch(z)


class Stack(nn.Module):
    """Units one behind the other."""

    def __init__(self, units: int, width: int = WIDTH) -> None:
        super().__init__()
        self.units = nn.ModuleList(Unit(width) for _ in range(units))

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        for unit in self.units:
            z = unit(z)
        return z


class UViT(nn.Module):
    """Two units, the second of which also takes what the first was given."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList([Unit(), Unit()])
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        inner = self.units[0](z)
        return self.units[1](self.skip_linear(torch.cat([inner, z], dim=-1)))


def disturbed(network: nn.Module, std: float = 0.3) -> dict[str, nn.Parameter]:
    """Random gates, by the ends of their names."""
    with torch.no_grad():
        for _, gate in gates_of(network):
            for parameter in gate.parameters():
                parameter.add_(std * torch.randn_like(parameter))
    return {
        f"{name}.{kind}": parameter
        for name, gate in gates_of(network)
        for kind, parameter in gate.named_parameters()
    }


def slope(loss: Callable[[], Tensor], parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient by central differences."""
    step, found = 1e-5, torch.zeros_like(parameter)
    with torch.no_grad():
        for i in range(parameter.numel()):
            flat, kept = parameter.view(-1), parameter.view(-1)[i].item()
            ends = []
            for value in (kept + step, kept - step):
                flat[i] = value
                ends.append(loss())
            flat[i] = kept
            found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full", "level": "block"},
        {"mode": "alpha_rho", "level": "block", "alpha_shape": "channel"},
        {"mode": "alpha_beta", "time_conditioned": True},
        {"mode": "alpha_beta", "alpha_shape": "channel", "time_conditioned": True},
    ],
)
def test_gradients_of_gates_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = Stack(1 if "time_conditioned" in options else 3).double()
    apply_gates(network, ResidualGates(**options))
    parameters = disturbed(network)
    z, weights = torch.randn(2, 4, WIDTH).double(), torch.randn(2, 4, WIDTH).double()
    t = torch.tensor([3.0, 400.0])

    def loss() -> Tensor:
        return (network(z, t) * weights).sum()

    loss().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, slope(loss, parameter), atol=1e-8, rtol=1e-6, msg=name
        )


def test_gradients_of_a_skips_gate_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    network = UViT().double()
    apply_gates(network, ResidualGates(mode="none", skip=True))
    (sigma,) = disturbed(network).values()
    z = torch.randn(2, 4, WIDTH).double()

    def loss() -> Tensor:
        return network(z).square().sum()

    loss().backward()
    assert sigma.grad is not None
    torch.testing.assert_close(sigma.grad, slope(loss, sigma), atol=1e-8, rtol=1e-6)
    inner = network.units[0](z)
    with torch.no_grad():
        fused = network.skip_linear.forward(torch.cat([inner, (1 + sigma) * z], dim=-1))
        torch.testing.assert_close(network(z), network.units[1](fused))


@pytest.mark.parametrize("level", ["branch", "block"])
def test_the_sensitivity_gives_the_gates_their_gradients(level: Any) -> None:
    # dL/dalpha = <s, F>, dL/dbeta = sum of s, dL/drho = <s, z>, with s = dL/dz behind the unit.
    torch.manual_seed(0)
    network = Stack(3).double()
    mode: Any = "full" if level == "block" else "alpha_beta"
    apply_gates(network, ResidualGates(mode=mode, level=level))
    parameters = disturbed(network)
    unit = network.units[1]
    seen: dict[str, Tensor] = {}

    def look(_unit: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen["z"] = args[0].detach()
        output.register_hook(lambda s: seen.__setitem__("s", s))

    unit.register_forward_hook(look)
    network(torch.randn(2, 4, WIDTH).double()).square().sum().backward()
    z, s = seen["z"], seen["s"]
    with torch.no_grad():
        branch = unit.last.forward(torch.tanh(unit.first(z)))
    at = "units.1.rdm_gate" if level == "block" else "units.1.last.rdm_gate"
    wanted = {"delta": (s * branch).sum().reshape(1), "beta": s.sum(dim=(0, 1))}
    if level == "block":
        wanted["kappa"] = (s * z).sum().reshape(1)
    for kind, gradient in wanted.items():
        torch.testing.assert_close(parameters[f"{at}.{kind}"].grad, gradient, rtol=1e-10, atol=0)


def test_a_gated_stack_is_the_recursion() -> None:
    torch.manual_seed(0)
    for level, mode in (("branch", "alpha_beta"), ("block", "full"), ("block", "beta")):
        network = Stack(2).double()
        plain = Stack(2).double()
        plain.load_state_dict(network.state_dict())
        options: Any = {"mode": mode, "level": level}
        apply_gates(network, ResidualGates(**options))
        values = disturbed(network)
        z = torch.randn(5, WIDTH).double()
        found = network(z)
        for i, unit in enumerate(plain.units):
            named = {n.split(".")[-1]: p for n, p in values.items() if n.startswith(f"units.{i}")}
            rho, alpha = 1 + named.get("kappa", 0), 1 + named.get("delta", 0)
            z = rho * z + alpha * unit.branch(z) + named["beta"]
        torch.testing.assert_close(found, z, rtol=1e-14, atol=1e-14)


def test_ddim_is_a_gated_stack() -> None:
    # z' = z + [sqrt(1-a') - k sqrt(1-a)] eps(z) + (k-1) z with k = sqrt(a'/a): mode alpha_rho.
    torch.manual_seed(0)
    steps = 50
    schedule = VPSchedule()
    times = torch.linspace(999, 0, steps + 1).double()
    alpha, sigma = schedule.levels(times, times)
    network = Stack(steps).double()
    z = torch.randn(4, WIDTH).double()
    expected = z
    for i, unit in enumerate(network.units):
        eps = unit.branch(expected)
        x0 = (expected - sigma[i] * eps) / alpha[i]
        expected = alpha[i + 1] * x0 + sigma[i + 1] * eps
    apply_gates(network, ResidualGates(mode="alpha_rho", level="block"))
    with torch.no_grad():
        for i, (_, gate) in enumerate(gates_of(network)):
            ratio = alpha[i + 1] / alpha[i]
            gate.get_parameter("kappa").fill_(ratio - 1)
            gate.get_parameter("delta").fill_(sigma[i + 1] - ratio * sigma[i] - 1)
    assert alpha[-1] / alpha[0] > 10  # a long way
    assert (network(z) - expected).abs().max() / expected.abs().max() < 2e-14


def test_a_stack_that_starts_as_an_ode_solver_is_of_first_order() -> None:
    torch.manual_seed(0)
    field = Unit().double()
    z = torch.randn(8, WIDTH).double()

    def error(units: int, exact: Tensor) -> float:
        network = Stack(units).double()
        for unit in network.units:
            unit.load_state_dict(field.state_dict())
        apply_gates(network, ResidualGates(init="ode"))
        return (network(z) - exact).norm().item()

    exact = z
    for _ in range(50):  # the classical method of fourth order
        h = 1 / 50
        a = field.branch(exact)
        b = field.branch(exact + h / 2 * a)
        c = field.branch(exact + h / 2 * b)
        exact = exact + h / 6 * (a + 2 * b + 2 * c + field.branch(exact + h * c))
    # Alpha is float64 here, as all of the network is.
    errors = [error(units, exact) for units in (16, 32, 64)]
    ratios = [early / late for early, late in pairwise(errors)]
    assert ratios == pytest.approx([2, 2], rel=0.03)


def test_time_conditioned_gates_depend_on_each_samples_own_time() -> None:
    torch.manual_seed(0)
    network = Stack(1)
    apply_gates(network, ResidualGates(time_conditioned=True))
    disturbed(network)
    z, t = torch.randn(1, WIDTH).expand(3, -1), torch.tensor([0.0, 500.0, 999.0])
    together = network(z, t)
    alone = [network(z[i : i + 1], t[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together[0] - together[1]).abs().max() > 0.01
    folded = network(z.repeat_interleave(2, dim=0), t)  # two frames a sample
    torch.testing.assert_close(folded, together.repeat_interleave(2, dim=0))
    with torch.autocast("cpu", torch.bfloat16):  # gates compute in full precision all the same
        (gate,) = [gate for _, gate in gates_of(network)]
        with at(time_features(t)):
            found = [gate._alpha(z), gate._beta(z)]
    with at(time_features(t)):
        assert all(map(torch.equal, found, [gate._alpha(z), gate._beta(z)]))
    features = time_features(torch.arange(0.0, 1000.0))
    assert features.abs().max() <= 1
    assert torch.pdist(features).min() > 0.1  # no two times look alike

"""How much units amplify, against Jacobians that are known, and that it can be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.gates import ResidualGates, apply_gates, gate_parameters, gates_of
from fewstep.networks.gates.jacobian import (
    UnitCall,
    amplification,
    measured_units,
    unevenness,
    units_of,
)
from lightning_modules.preparation import checkpoint_activations, compile_blocks

Tinies = Callable[[str], Any]
WIDTH = 5


class LinearUnit(nn.Module):
    """``z + W z``."""

    residual_branches = ("last",)
    residual_stream = "z"

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.last(z)


def stack(units: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(LinearUnit() for _ in range(units))).double()


def directions(seed: int = 0) -> Callable[[Tensor], Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return lambda stream: torch.randn(stream.shape[1:], generator=numbers, dtype=torch.float64)


def measured(
    network: nn.Module, names: Sequence[str], run: Callable[[], Any], seed: int = 0
) -> list[Tensor]:
    with measured_units(network, names, directions(seed)) as found:
        run()
    return list(found)


@pytest.mark.parametrize("level", ["branch", "block"])
def test_linear_units_amplify_by_their_matrix(level: Any) -> None:
    network = stack()
    mode: Any = "full" if level == "block" else "alpha_beta"
    apply_gates(network, ResidualGates(mode=mode, level=level))
    with torch.no_grad():
        for parameter in gate_parameters(network):
            parameter.normal_(std=0.5)
    z = torch.randn(4, WIDTH, dtype=torch.float64)
    found = measured(network, ["0", "2"], lambda: network(z))
    draw, wanted = directions(), []
    for number, unit in ((0, network[0]), (2, network[2])):
        gate = next(g for n, g in gates_of(network) if n.startswith(f"{number}."))
        alpha = 1 + gate.get_parameter("delta")
        rho = 1 + (gate.get_parameter("kappa") if level == "block" else 0)
        v = draw(z)
        amplified = rho * v + alpha * (unit.last.weight @ v)
        wanted.append((amplified.norm() / v.norm()).expand(4))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    expected = torch.stack([rows[0].log() ** 2 for rows in wanted]).mean()
    torch.testing.assert_close(unevenness(found), expected, rtol=1e-12, atol=0)
    assert expected > 0.01


def test_the_penaltys_gradients_are_those_of_finite_differences(tiny: Tinies) -> None:
    # On a real block: attention, adaLN, GELU and gates, all with a second derivative.
    it = tiny("dit")
    network = it.network.double()
    apply_gates(network, ResidualGates(mode="alpha_rho", level="block"))
    (name,) = list(units_of(network))[1:]

    def penalty() -> Tensor:
        return unevenness(measured(network, [name], lambda: it(network)))

    gate = dict(gates_of(network))[f"{name}.rdm_gate"]
    block = network.get_submodule(name)
    wanted = [gate.get_parameter("delta"), gate.get_parameter("kappa"), block.attn1.to_v.weight]
    gradients = torch.autograd.grad(penalty(), wanted)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        flat, ends = parameter.data.view(-1), []
        for step in (1e-5, -2e-5):
            flat[0] += step
            ends.append(penalty().item())
        flat[0] += 1e-5
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient.flatten()[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
        assert gradient.any()


def test_the_measured_unit_changes_neither_the_output_nor_what_is_in_front(tiny: Tinies) -> None:
    it = tiny("dit")
    first, second = units_of(it.network)
    plain = it()
    with measured_units(it.network, [second], directions()) as found:
        output = it()
    assert torch.equal(output, plain)
    unevenness(found).backward()
    blocks = dict(it.network.named_parameters())
    assert all(blocks[n].grad is None for n in blocks if n.startswith(f"{first}.attn1"))
    assert any(blocks[n].grad is not None for n in blocks if n.startswith(f"{second}.attn1"))


FLOAT32_INSIDE = (
    "flux",
    "wan",
    "ltx",
    "amused",
)  # norms or rotations are, whatever the network is in


def last_call(it: Any, network: nn.Module) -> UnitCall:
    """How the last unit is called."""
    *_, (name, place) = units_of(network).items()
    block, found = network.get_submodule(name), []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        it(network)
    handle.remove()
    return UnitCall(block, place, *found[0])


def test_units_of_every_family_agree_with_small_steps(family: str, tiny: Tinies) -> None:
    it = tiny(family)
    network = it.network.double()
    apply_gates(network, ResidualGates())
    call = last_call(it, network)
    v = torch.randn_like(call.stream)
    h, rtol = (1e-3, 1e-2) if family in FLOAT32_INSIDE else (1e-5, 1e-4)
    with torch.no_grad():
        ends = [call(call.stream + step * v).flatten(1) for step in (h, -h)]
    slopes = (ends[0] - ends[1]).norm(dim=1) / (2 * h) / v.flatten(1).norm(dim=1)
    torch.testing.assert_close(amplification(call, v), slopes, rtol=rtol, atol=0)

    weights = list(call.block.parameters())
    ways = [torch.randn_like(weight) for weight in weights]
    found = torch.autograd.grad(
        unevenness([amplification(call, v)]), weights, materialize_grads=True
    )
    sizes = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for weight, way in zip(weights, ways, strict=True):
                weight.add_(step * way)
            sizes.append(unevenness([amplification(call, v)]).item())
    slope = sum((g * way).sum().item() for g, way in zip(found, ways, strict=True))
    assert slope == pytest.approx((sizes[0] - sizes[1]) / (2 * h), rel=rtol)


@pytest.mark.parametrize("of", ["dit", "unet", "video_dit"])
def test_units_are_measured_in_training_as_it_is(of: str, tiny: Tinies) -> None:
    # With gates that depend on the time, a float32 stream, autocast and recomputed activations.
    it = tiny(of)
    apply_gates(it.network, ResidualGates(time_conditioned=True, stream_dtype="float32"))
    names = list(units_of(it.network))
    numbers: dict[str, list[Tensor]] = {}
    for name, autocast in (("float32", False), ("bfloat16", True)):
        torch.manual_seed(0)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            measured_units(it.network, names, lambda z: torch.randn(z.shape[1:])) as found,
        ):
            it()
        numbers[name] = list(found)
    assert len(numbers["float32"]) == len(names)
    torch.testing.assert_close(numbers["bfloat16"], numbers["float32"], rtol=0.02, atol=0.02)
    unevenness(numbers["bfloat16"]).backward()
    assert all(p.grad.isfinite().all() for p in it.network.parameters() if p.grad is not None)


def test_recomputed_activations_change_no_number() -> None:
    def gradient(recomputed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        network = DiT(8, 3, num_layers=2, num_heads=2, head_dim=8)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        apply_gates(network, ResidualGates())
        if recomputed:
            checkpoint_activations(network)
        numbers = torch.Generator().manual_seed(1)
        x, t = torch.randn(2, 3, 8, 8, generator=numbers), torch.tensor([10.0, 500.0])
        names = list(units_of(network))
        with measured_units(network, names, lambda z: torch.ones(z.shape[1:])) as found:
            output = network(x, t, torch.tensor([1, 2]))
        (output.square().mean() + unevenness(found)).backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    plain, again = gradient(recomputed=False), gradient(recomputed=True)
    assert len(plain) == len(again)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class Rounding(nn.Module):
    """A unit with an operation of its own, which has no forward derivative."""

    residual_branches = ("last",)
    residual_stream = "z"

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = z + self.Own.apply(self.last(z))
        return found


def test_what_cannot_be_measured_is_refused() -> None:
    network = nn.Sequential(Rounding()).double()
    with pytest.raises(FewstepError, match="of a Rounding needs a forward derivative"):
        measured(network, ["0"], lambda: network(torch.ones(1, WIDTH).double()))
    backbone = DiT(8, 3, num_layers=1)
    compile_blocks(backbone)
    with pytest.raises(FewstepError, match="compile_blocks: false"):
        measured(backbone, list(units_of(backbone)), lambda: None)

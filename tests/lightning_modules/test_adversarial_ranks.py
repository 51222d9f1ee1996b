"""Adversarial post-training on several ranks: whose gradients there are, and what is gathered."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fewstep.networks.query_discriminator import QueryDiscriminator
from lightning_modules import FewStepModule
from lightning_modules.parallel import shard

from ranks import in_group, run_ranks
from training_runs import (
    Data,
    assert_same_run,
    method,
    network,
    teacher,
    trained,
    trainer_of,
)

ROLES = ("student", "discriminator")
SLOW = pytest.mark.slow
OUTPUT = "proj_out"  # layers of a DiT behind its last block


@pytest.mark.parametrize(
    ("kind", "world", "checkpointed"),
    [
        ("fsdp", 2, True),
        pytest.param("ddp", 2, True, marks=SLOW),
        pytest.param("ddp", 2, False, marks=SLOW),
        pytest.param("fsdp", 2, False, marks=SLOW),
        pytest.param("hybrid", 4, True, marks=SLOW),
    ],
)
def test_the_published_loss_trains_on_ranks_as_on_one_device(
    kind: str, world: int, checkpointed: bool
) -> None:
    options: dict[str, Any] = {"loss": "non_saturating", "updates": 2}
    (expected,) = trained(1, "single", "apt", **options)
    for found in trained(world, kind, "apt", checkpoint_activations=checkpointed, **options):
        assert found[2] == (kind != "ddp")
        assert_same_run(found, expected)


@pytest.mark.slow
def test_pairs_train_on_a_hybrid_of_ranks_as_on_one_device() -> None:
    (expected,) = trained(1, "single", "apt")
    for found in trained(4, "hybrid", "apt", checkpoint_activations=True, accumulate=2):
        assert_same_run(found, expected)


class Turns(pl.Callback):
    """What roles are like when a turn's backward passes are done, before its own step.

    Attributes:
        seen: of each turn the role whose it is, its parameters without a gradient, those whose
            gradient is not all zeros on this rank, those of the other role that have a gradient,
            and whether the other role's weights are what they were before the turn.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str], set[str], list[str], bool]] = []
        self.weights: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        step = module._step
        self.weights = {role: weights_of(module, role) for role in ROLES}

        def watched(role: str, optimizer: Any) -> Tensor:
            self.look(module, role)
            norm: Tensor = step(role, optimizer)
            self.weights[role] = weights_of(module, role)
            return norm

        module._step = watched

    def look(self, module: FewStepModule, role: str) -> None:
        (other,) = set(ROLES) - {role}
        own = {name: p.grad for name, p in getattr(module, role).named_parameters()}
        missing = [name for name, gradient in own.items() if gradient is None]
        moving = {n for n, gradient in own.items() if gradient is not None and part(gradient).any()}
        stray = [n for n, p in getattr(module, other).named_parameters() if p.grad is not None]
        now, before = weights_of(module, other), self.weights[other]
        same = all(torch.equal(now[name], value) for name, value in before.items())
        self.seen.append((role, missing, moving, stray, same))


def part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(module: FewStepModule, role: str) -> dict[str, Tensor]:
    named = getattr(module, role).named_parameters()
    return {name: part(p).detach().clone() for name, p in named}


def turns_of(kind: str, loss: str, accumulate: int) -> Any:
    module, turns = method("apt", loss=loss, accumulate=accumulate), Turns()
    trainer_of(kind, 2, 2, turns).fit(module, Data())
    roles = {role: [n for n, _ in getattr(module, role).named_parameters()] for role in ROLES}
    return turns.seen, roles


@pytest.mark.parametrize(
    ("kind", "loss", "accumulate"),
    [
        ("ddp", "non_saturating", 1),
        ("fsdp", "non_saturating", 1),
        pytest.param("ddp", "relativistic", 2, marks=SLOW),
        pytest.param("fsdp", "relativistic", 2, marks=SLOW),
    ],
)
def test_a_turn_moves_and_leaves_gradients_in_one_role_only(
    kind: str, loss: str, accumulate: int
) -> None:
    (first, roles), (second, _) = run_ranks(2, turns_of, kind, loss, accumulate)
    assert [role for role, *_ in first] == ["discriminator", "student"] * 2
    for role, missing, _, stray, same in [*first, *second]:
        assert missing == stray == []
        assert same, f"the other role's weights moved in the {role}'s turn"
    for (role, _, mine, *_), (_, _, others, *_) in zip(first, second, strict=True):
        still = set(roles[role]) - mine - others
        # Nothing depends on what the discriminator's network has after its last block.
        assert all(role == "discriminator" and OUTPUT in name for name in still), (role, still)


def built(name: str) -> nn.Module:
    """A role on two ranks, sharded."""
    role = teacher().requires_grad_(True) if name == "student" else QueryDiscriminator(network())
    shard(role, init_device_mesh("cpu", (2,)))
    return role


def with_gradient(name: str) -> tuple[int, int, bool]:
    """Parameters without a gradient once frozen ones are trained, and with one once not any more.

    Between, the role is evaluated without gradient; the third says whether its input has one.
    """
    role: Any = built(name)
    x = torch.randn(2, 1, 8, 8)
    shards = list(role.parameters())  # what optimisers hold, and toggling them flips
    given = torch.full((2,), 500.0), {"class_labels": torch.tensor([1, 2])}

    def output(sample: Tensor) -> Any:
        made = role(sample, *given)
        return made.x0 if name == "student" else made

    counts = []
    for trained_now in (True, False):
        for parameter in shards:
            parameter.grad = None
            parameter.requires_grad_(not trained_now)
        with torch.no_grad():
            output(x)
        for parameter in shards:
            parameter.requires_grad_(trained_now)
        asked = x.clone().requires_grad_()
        output(asked).sum().backward()
        counts.append(sum(parameter.grad is not None for parameter in shards))
    assert asked.grad is not None
    return len(shards) - counts[0], counts[1], bool(asked.grad.any())


@pytest.mark.parametrize("name", ROLES)
def test_no_gathered_copy_remembers_who_was_trained_before(name: str) -> None:
    """FSDP2 by default keeps a root's parameters after a forward pass, with their old flags."""
    assert run_ranks(2, in_group, with_gradient, name) == [(0, 0, True)] * 2


def gathered_in_heads() -> list[tuple[set[str], set[torch.dtype]]]:
    """Which heads are whole on this rank, and in what precision, while each of them computes."""
    discriminator = QueryDiscriminator(network())
    shard(discriminator, init_device_mesh("cpu", (2,)), torch.bfloat16)
    seen = []

    def look(*_: Any) -> None:
        heads = dict(discriminator.heads.named_parameters())
        there = {name: p for name, p in heads.items() if not isinstance(p, DTensor)}
        seen.append(({name.split(".")[0] for name in there}, {p.dtype for p in there.values()}))

    for head in discriminator.heads.children():
        head.get_submodule("norm").register_forward_pre_hook(look)
    labels = {"class_labels": torch.tensor([1, 2])}
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), labels)
    logits.sum().backward()
    assert all(isinstance(p.grad, DTensor) for p in discriminator.heads.parameters())
    return seen


def test_heads_are_gathered_one_at_a_time_in_float32() -> None:
    one_by_one = [({"0"}, {torch.float32}), ({"1"}, {torch.float32})]
    assert run_ranks(2, in_group, gathered_in_heads) == [one_by_one] * 2

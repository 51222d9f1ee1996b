"""Copies of a sharded model, which exchange gradients once an update and are one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fewstep.errors import FewstepError
from lightning_modules.copies import crossing, units_within
from lightning_modules.gradients import kept_out

from ranks import in_group, run_ranks
from training_runs import assert_same_run, data_for, method, trained, trainer_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "adversarial", "mcm", "apt"])
def test_hybrid_sharding_with_micro_batches_trains_as_one_device_does(name: str) -> None:
    (expected,) = trained(1, "single", name, accumulate=4)
    for found in trained(4, "hybrid", name, accumulate=4):
        assert found[2]
        assert_same_run(found, expected)


class Crossings:
    """Counts what is sent from copy to copy while it is in place."""

    def __init__(self) -> None:
        self.seen, self._send, self._patch = 0, dist.all_reduce, pytest.MonkeyPatch()

    def __enter__(self) -> Crossings:
        self._patch.setattr(dist, "all_reduce", self)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.seen += options.get("group") is not None  # what all ranks reduce is none of them
        return self._send(*given, **options)


def crossings(accumulate: int, name: str) -> list[int]:
    """How many gradients, of how many units, cross between copies in two updates."""
    module, trainer = method(name, accumulate=accumulate), trainer_of("hybrid", 2, 2)
    with Crossings() as counted:
        trainer.fit(module, data_for(name))
    units = (len(units_within(getattr(module, role))) for role in module.trained_roles)
    return [counted.seen, sum(units)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "apt"])
def test_gradients_cross_between_copies_once_an_update(name: str) -> None:
    """Two copies of one device each."""
    ((once, units), _) = run_ranks(2, crossings, 1, name)
    assert once >= units
    for found in run_ranks(2, crossings, 4, name):
        assert found == [once, units]


def networks(sharded: bool) -> tuple[nn.Module, nn.Module]:
    """A student and its judge, in two copies of one device each."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        if sharded:
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
            for module in (*network, network):
                fully_shard(module, mesh=mesh)
        made.append(network)
    return made[0], made[1]


def samples() -> Tensor:
    """Two micro-batches ``(2, ranks, B, 3)``."""
    return torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))


def passed_through() -> tuple[list[Tensor], int]:
    """Gradients of a judge, and of a student whose passes go through the judge between its own."""
    with Crossings() as counted:
        student, judge = two_passes_each()
    gradients: list[Any] = [p.grad for net in (student, judge) for p in net.parameters()]
    return [gradient.full_tensor() for gradient in gradients], counted.seen


def two_passes_each() -> tuple[nn.Module, nn.Module]:
    student, judge = networks(sharded=True)
    units = units_within(student), units_within(judge)
    for number, micro_batch in enumerate(samples()):
        x, last = micro_batch[dist.get_rank()], number == 1
        with kept_out(list(student.parameters())), crossing(units[1], units[0], last):
            judge(x).square().mean().backward()
        with kept_out(list(judge.parameters())), crossing(units[0], units[1], last):
            judge(student(x)).mean().backward()
    return student, judge


def by_one_device() -> list[Tensor]:
    """The same gradients, of networks of which there is one copy."""
    student, judge = networks(sharded=False)
    x = samples().transpose(0, 1)
    judge(x).square().mean(dim=(0, 2, 3)).sum().backward(inputs=list(judge.parameters()))
    judge(student(x)).mean(dim=(0, 2, 3)).sum().backward(inputs=list(student.parameters()))
    gradients: list[Any] = [p.grad for net in (student, judge) for p in net.parameters()]
    return gradients


def test_a_pass_through_another_role_leaves_what_that_role_has_gathered() -> None:
    (expected,) = run_ranks(1, by_one_device)
    for found, crossed in run_ranks(2, in_group, passed_through):
        torch.testing.assert_close(found, expected)
        assert crossed == 4, "two layers of each, once"


def left_behind() -> str:
    student, _ = networks(sharded=True)
    units, x = units_within(student), samples()[0, dist.get_rank()]
    with crossing(units, [], last=False):
        student(x).mean().backward()
    with pytest.raises(FewstepError) as caught, crossing(units, [], last=True):
        student[0](x).mean().backward()  # type: ignore[index]
    return str(caught.value)


def test_a_unit_without_gradient_in_the_last_pass_is_not_forgotten() -> None:
    for message in run_ranks(2, in_group, left_behind):
        assert "accumulate: 1" in message

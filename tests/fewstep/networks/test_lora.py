"""Student, average and teacher on one network."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jsonargparse
import pytest
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import Denoiser, VPSchedule
from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError
from fewstep.networks import ema_update
from fewstep.networks.lora import LoRA, SharedBase, is_lora_spec, pinned, rebuild, share_base
from lightning_modules.parallel import shard

from ranks import in_group, run_ranks
from training_runs import network

OPTIONS = LoRA(rank=4, alpha=8)


class Plain(Backbone):
    """A network without any library: ``(B, D)`` to ``(B, D)``."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.config = {"width": width}
        self.sample_shape = (width,)
        self.first = nn.Linear(width, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.last = nn.Linear(12, width)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x_t) + t[:, None] / 1000)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        output: Tensor = self.last(input=hidden)  # as some networks do
        return output


def teacher() -> Denoiser:
    return Denoiser(network(), VPSchedule(), "v_prediction")


def shared(**options: Any) -> SharedBase:
    return share_base(teacher(), LoRA(**{"rank": 4, "alpha": 8, **options}))


def trained(**options: Any) -> SharedBase:
    """With adapters that are no longer zero, and differ."""
    made = shared(**options)
    randomise(made.student, 1)
    randomise(made.ema, 2)
    return made


@torch.no_grad()
def randomise(role: nn.Module, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for parameter in role.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))


def inputs(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 8, 8, generator=draws)
    t = torch.linspace(100, 900, size)
    return x, t, {"class_labels": torch.arange(size)}


def roles(of: SharedBase) -> dict[str, Denoiser]:
    return {"student": of.student, "teacher": of.teacher, "ema": of.ema}


def gradients(of: SharedBase) -> list[Tensor]:
    found = [parameter.grad for parameter in of.student.parameters()]
    of.student.zero_grad()
    return [gradient.clone() for gradient in found if gradient is not None]


def assert_all_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


# ---------------------------------------------------------------------- what the roles compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_and_its_average_start_as_the_teacher_exactly(dtype: torch.dtype) -> None:
    alone = teacher().to(dtype)
    expected = alone.raw(*inputs())
    for role in roles(share_base(alone, OPTIONS)).values():
        assert torch.equal(role.raw(*inputs()), expected)


def test_a_network_of_any_kind_can_be_the_base() -> None:
    torch.manual_seed(0)
    alone = Denoiser(Plain(), VPSchedule(), "epsilon")
    x, t = torch.randn(3, 6), torch.tensor([10.0, 500.0, 900.0])
    expected = alone.raw(x, t)
    made = share_base(alone, LoRA(rank=2, target_modules=["layers.0", "last"]))
    assert torch.equal(made.student.raw(x, t), expected)
    randomise(made.student, 0)
    assert not torch.allclose(made.student.raw(x, t), expected, atol=1e-3)
    assert torch.equal(made.teacher.raw(x, t), expected)
    assert list(made.student.state_dict()) == [
        f"adapter.{layer}.lora_{kind}.weight" for layer in ("layers.0", "last") for kind in "AB"
    ]


def test_training_moves_the_student_and_its_average_and_never_the_teacher() -> None:
    alone = teacher()
    expected = alone.raw(*inputs())
    made = share_base(alone, OPTIONS)
    optimizer = torch.optim.AdamW(made.student.parameters(), lr=3e-2)
    losses = []
    for _ in range(10):
        goal = -made.teacher.raw(*inputs())
        loss = (made.student.raw(*inputs()) - goal).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update(made.ema, made.student, 0.5)
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(made.teacher.raw(*inputs()), expected)
    distances = {n: (r.raw(*inputs()) - expected).norm() for n, r in roles(made).items()}
    assert 0 < distances["ema"] < distances["student"]


def test_the_average_is_of_the_adapters_alone() -> None:
    made = trained()
    pairs = zip(parameters(made.ema), parameters(made.student), strict=True)
    mixed = [0.9 * average + 0.1 * latest for average, latest in pairs]
    base = [parameter.clone() for parameter in made.teacher.parameters()]
    ema_update(made.ema, made.student, 0.9)
    for mine, expected in zip(made.ema.parameters(), mixed, strict=True):
        torch.testing.assert_close(mine, expected)
    assert_all_equal(list(made.teacher.parameters()), base)


def parameters(role: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in role.parameters()]


def test_alpha_over_rank_scales_what_is_added() -> None:
    once, twice = (trained(alpha=alpha, target_modules=["proj_out_2"]) for alpha in (4, 8))
    base = once.teacher.raw(*inputs())
    added, more = (made.student.raw(*inputs()) - base for made in (once, twice))
    torch.testing.assert_close(more, 2 * added, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- one network, many calls


def test_each_call_uses_its_own_adapter_whatever_ran_before() -> None:
    made = trained()
    expected = {name: role.raw(*inputs()).detach() for name, role in roles(made).items()}
    assert len({value.sum().item() for value in expected.values()}) == 3
    order = ["ema", "student", "student", "teacher", "ema", "teacher", "student", "ema"]
    for number, name in enumerate(order):
        with torch.set_grad_enabled(number % 3 > 0):
            assert torch.equal(roles(made)[name].raw(*inputs()), expected[name])


@pytest.mark.parametrize("outer", ["student", "teacher", "ema"])
@pytest.mark.parametrize("within", ["student", "teacher", "ema"])
def test_a_call_within_a_call_changes_neither(outer: str, within: str) -> None:
    made = trained()
    expected = {name: role.raw(*inputs()).detach() for name, role in roles(made).items()}
    block = made.teacher.backbone.get_submodule("transformer.transformer_blocks.0")
    inside: list[Tensor] = []

    def call(*_: Any) -> None:
        if not inside:
            inside.append(torch.empty(0))  # so that the call within makes no further one
            inside[0] = roles(made)[within].raw(*inputs())

    block.register_forward_hook(call)
    assert torch.equal(roles(made)[outer].raw(*inputs()), expected[outer])
    assert torch.equal(inside[0], expected[within])


def test_a_call_that_fails_leaves_no_adapter_in_use() -> None:
    made = trained()
    x, t, cond = inputs()
    expected = made.teacher.raw(x, t, cond)
    with pytest.raises(IndexError):
        made.student.raw(x, t, {"class_labels": torch.full((4,), 99)})
    assert torch.equal(made.teacher.backbone(x, t, **cond), expected)


def test_switching_touches_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained()
    flags = [[p.requires_grad for p in role.parameters()] for role in roles(made).values()]
    assert [set(values) for values in flags] == [{True}, {False}, {False}]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer was switched")

    for method in ("set_adapter", "enable_adapters", "set_requires_grad"):
        monkeypatch.setattr(BaseTunerLayer, method, refuse)
    for role in roles(made).values():
        role.raw(*inputs())
        assert flags == [[p.requires_grad for p in r.parameters()] for r in roles(made).values()]


def test_gradient_is_the_same_whatever_ran_between_forward_and_backward() -> None:
    made = trained()
    made.student.raw(*inputs()).square().sum().backward()
    expected = gradients(made)
    output = made.student.raw(*inputs())
    made.ema.raw(*inputs(1))
    with torch.no_grad():
        made.student.raw(*inputs(2))
    made.teacher.raw(*inputs(3))
    output.square().sum().backward()
    assert_all_equal(gradients(made), expected)
    assert all(p.grad is None for r in (made.teacher, made.ema) for p in r.parameters())


class Recomputing:
    """What keeps a block's input alone must pin the adapter in use."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = super().forward  # type: ignore[misc]
        return checkpoint(pinned(inner), *args, use_reentrant=False, **kwargs)


def recompute(of: SharedBase) -> None:
    for name in of.teacher.backbone.feature_blocks:
        block = of.teacher.backbone.get_submodule(name)
        block.__class__ = type("Block", (Recomputing, type(block)), {})


@pytest.mark.parametrize("threaded", [False, True])
def test_what_is_computed_once_more_sees_the_adapter_of_its_forward_pass(threaded: bool) -> None:
    made = trained(dropout=0.2)
    torch.manual_seed(5)
    made.student.raw(*inputs()).square().sum().backward()
    expected = gradients(made)
    recompute(made)
    torch.manual_seed(5)
    loss = made.student.raw(*inputs()).square().sum()
    with torch.no_grad():
        made.teacher.raw(*inputs(1))
        made.ema.raw(*inputs(1))
    again = partial(loss.backward, retain_graph=True)
    for _ in range(2):  # as a graph that is kept may be gone through twice
        if threaded:  # as on a GPU, where autograd has a thread of its own
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()
        else:
            again()
        assert_all_equal(gradients(made), expected)
    x, t, cond = inputs()
    base = made.teacher.raw(x, t, cond)
    assert torch.equal(made.teacher.backbone(x, t, **cond), base)


@pytest.mark.slow
def test_compiled_blocks_use_the_adapter_of_each_call() -> None:
    made = trained()
    expected = {name: role.raw(*inputs()).detach() for name, role in roles(made).items()}
    for name in made.teacher.backbone.feature_blocks:
        made.teacher.backbone.get_submodule(name).compile(backend="eager")
    for name in ("student", "teacher", "ema", "student"):
        with torch.no_grad():
            torch.testing.assert_close(roles(made)[name].raw(*inputs()), expected[name])


# ---------------------------------------------------------------------- whose weights are whose


class Module(nn.Module):
    """All roles together, as in a training method."""

    def __init__(self, of: SharedBase) -> None:
        super().__init__()
        self.teacher, self.student, self.ema = of.teacher, of.student, of.ema


def test_the_base_is_the_teachers_alone() -> None:
    made = trained()
    size = sum(parameter.numel() for parameter in teacher().parameters())
    assert sum(parameter.numel() for parameter in made.teacher.parameters()) == size
    own = {name: value.numel() for name, value in made.student.state_dict().items()}
    assert own.keys() == made.ema.state_dict().keys()
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in own)
    assert not any("lora" in name for name in made.teacher.state_dict())
    whole = Module(made)
    assert sum(isinstance(module, Backbone) for module in whole.modules()) == 1
    assert len(whole.state_dict()) == len(list(whole.named_parameters(remove_duplicate=False)))
    assert sum(p.numel() for p in whole.parameters()) == size + 2 * sum(own.values())


def test_mode_and_precision_reach_a_roles_own_weights_and_no_others() -> None:
    made = trained(dropout=0.5)
    made.student.eval()
    assert torch.equal(made.student.raw(*inputs()), made.student.raw(*inputs()))
    made.student.train()
    assert not torch.equal(made.student.raw(*inputs()), made.student.raw(*inputs()))
    assert torch.equal(made.ema.raw(*inputs()), made.ema.raw(*inputs()))
    assert not any(module.training for module in made.teacher.modules())
    made.student.double()
    assert {p.dtype for p in made.student.parameters()} == {torch.float64}
    assert {p.dtype for r in (made.teacher, made.ema) for p in r.parameters()} == {torch.float32}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_in_half_precision_has_float32_adapters(when: str) -> None:
    exact = trained(init="gaussian")
    alone = teacher()
    if when == "before":
        alone.to(torch.bfloat16)
    made = share_base(alone, OPTIONS)
    made.teacher.to(torch.bfloat16)
    assert {p.dtype for p in made.teacher.parameters()} == {torch.bfloat16}
    for role, like in ((made.student, exact.student), (made.ema, exact.ema)):
        role.load_state_dict(like.state_dict())
        assert {p.dtype for p in role.parameters()} == {torch.float32}
        found, expected = role.raw(*inputs()), like.raw(*inputs())
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < 0.02 * expected.norm()
    made.student.raw(*inputs()).square().sum().backward()
    assert {g.dtype for g in gradients(made)} == {torch.float32}


def test_autocast_computes_about_the_same_and_trains_float32_adapters() -> None:
    made = trained()
    made.student.raw(*inputs()).square().sum().backward()
    expected = gradients(made)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = {name: role.raw(*inputs()) for name, role in roles(made).items()}
    for name, output in outputs.items():
        exact = roles(made)[name].raw(*inputs())
        assert not torch.equal(output, exact)
        assert (output - exact).norm() < 0.02 * exact.norm()
    outputs["student"].square().sum().backward()
    for mine, theirs in zip(gradients(made), expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.1 * theirs.norm() + 1e-4


def test_a_copy_shares_nothing() -> None:
    made = trained()
    expected = {name: role.raw(*inputs()) for name, role in roles(made).items()}
    copied = copy.deepcopy(made)
    for name, role in roles(copied).items():
        assert torch.equal(role.raw(*inputs()), expected[name])
    for role in roles(copied).values():
        randomise(role, 7)
    for name, role in roles(made).items():
        assert torch.equal(role.raw(*inputs()), expected[name])
        assert not torch.allclose(roles(copied)[name].raw(*inputs()), expected[name], atol=1e-2)


def test_adapters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = share_base(teacher(), OPTIONS, seed=3).student.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = share_base(teacher(), OPTIONS, seed=3).student.state_dict()
    other = share_base(teacher(), OPTIONS, seed=4).student.state_dict()
    assert_all_equal(list(first.values()), list(again.values()))
    name = next(iter(first))
    assert not torch.equal(first[name], other[name])


# ---------------------------------------------------------------------- sharded


def sharded_step(precision: torch.dtype | None) -> Any:
    """Outputs and averaged gradients of a step on this rank's half of the batch."""
    torch.set_num_threads(1)
    made = trained()
    recompute(made)
    shard(made.teacher, init_device_mesh("cpu", (2,)), precision)
    assert all(isinstance(p, DTensor) for p in made.teacher.parameters())
    assert not any(isinstance(p, DTensor) for p in made.student.parameters())
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    x, t, cond = inputs()
    mine = (x[half], t[half], {name: value[half] for name, value in cond.items()})
    own = list(made.student.parameters())
    for _ in range(2):  # the second pass finds what the first one left behind
        made.student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            output = made.student.raw(*mine)
            with torch.no_grad():
                others = [role.raw(*mine) for role in (made.teacher, made.ema, made.student)]
        output.square().mean().backward(inputs=own)
    found = [p.grad for p in own if p.grad is not None]
    for gradient in found:
        dist.all_reduce(gradient)
    return [*others, output.detach()], [gradient / 2 for gradient in found]


@pytest.mark.parametrize(("precision", "bound"), [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_a_sharded_base_gives_the_outputs_and_gradients_of_a_whole_one(
    precision: torch.dtype | None, bound: float
) -> None:
    made = trained()
    made.student.raw(*inputs()).square().mean().backward()
    expected = gradients(made)
    order = (made.teacher, made.ema, made.student, made.student)
    exact = [role.raw(*inputs()).detach() for role in order]
    (first, grads), (second, same) = run_ranks(2, in_group, sharded_step, precision)
    for mine, theirs, whole in zip(first, second, exact, strict=True):
        assert (torch.cat([mine, theirs]) - whole).norm() < bound * whole.norm()
    assert_all_equal(grads, same)
    for mine, whole in zip(grads, expected, strict=True):
        assert (mine - whole).norm() < bound * whole.norm() + 1e-6


# ---------------------------------------------------------------------- options and checkpoints


def test_a_checkpoint_rebuilds_the_student_on_its_base() -> None:
    made = trained(dropout=0.1)
    made.student.alpha_floor = 0.5
    file = io.BytesIO()
    torch.save({"spec": made.student.to_spec(), "state": made.student.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert is_lora_spec(saved["spec"])
    assert not is_lora_spec(made.teacher.to_spec())
    student = rebuild(teacher(), saved["spec"])
    student.load_state_dict(saved["state"])
    student.eval()
    made.student.eval()
    assert torch.equal(student.raw(*inputs()), made.student.raw(*inputs()))
    assert student.to_spec() == made.student.to_spec()


def test_the_options_that_were_left_open_are_recorded() -> None:
    spec = share_base(teacher(), LoRA(rank=2)).student.to_spec()
    assert spec["lora"]["alpha"] == 2
    assert spec["lora"]["target_modules"] == [
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    ]


def test_another_base_is_refused() -> None:
    spec = shared().student.to_spec()
    other = Denoiser(network(), VPSchedule(), "epsilon")
    with pytest.raises(FewstepError, match=r"prediction_type was .*v_prediction.* here .*epsilon"):
        rebuild(other, spec)


def test_a_base_takes_adapters_once() -> None:
    made = shared()
    with pytest.raises(FewstepError, match="adapters already; load the teacher anew"):
        share_base(made.teacher, OPTIONS)


def test_without_peft_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[lora\]'"):
        shared()


def test_options_are_read_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--lora", type=LoRA | None)

    def read(text: str) -> Any:
        return parser.instantiate_classes(parser.parse_string(text)).lora

    assert read("lora: null") is None
    assert read("lora: {}") == LoRA(64, None, None, 0.0, "kaiming")
    assert read("lora: {rank: 4, alpha: 8, target_modules: [to_q], init: gaussian}") == LoRA(
        4, 8, ["to_q"], 0.0, "gaussian"
    )
    assert read("lora: {target_modules: '.*attn1.*'}").target_modules == ".*attn1.*"


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match="A LoRA needs a rank of at least 1"):
        LoRA(**wrong)


@pytest.mark.parametrize("call", [torch.Tensor.requires_grad_, torch.Tensor.detach])
def test_gradient_reaches_a_sample_through_every_role(call: Callable[[Tensor], Tensor]) -> None:
    """A discriminator's gradient goes through a frozen network into the student's output."""
    made = trained()
    x, t, cond = inputs()
    for role in roles(made).values():
        sample = call(x.clone())
        output = role.raw(sample, t, cond)
        if sample.requires_grad:
            (gradient,) = torch.autograd.grad(output.square().sum(), sample)
            assert gradient.norm() > 0
        else:
            assert output.requires_grad == (role is made.student)

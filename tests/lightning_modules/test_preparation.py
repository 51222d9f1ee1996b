"""Precision, recomputed activations and kinds of sharding: what they may change, and what not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.pipelines import load_denoiser_of
from lightning_modules.preparation import check_precision, checkpoint_activations, keep_in

from ranks import run_ranks
from tiny_transformers import save_wan
from training_runs import Data, assert_same_run, method, network, trained, trainer_of


def bytes_kept(network: torch.nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Bytes that autograd keeps for the backward pass, and the gradient of the input."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(x, torch.full((len(x),), 500.0), torch.zeros(len(x), dtype=torch.long))
    output.square().sum().backward()
    assert x.grad is not None
    return kept, x.grad


def test_recomputed_activations_are_not_kept_and_give_the_same_gradient() -> None:
    plain = network()
    recomputing = copy.deepcopy(plain)
    checkpoint_activations(recomputing)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    most, expected = bytes_kept(plain, x)
    least, found = bytes_kept(recomputing, x)
    assert least < 0.4 * most
    assert torch.equal(found, expected)
    for mine, theirs in zip(recomputing.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_a_copy_of_a_recomputing_network_is_a_network_of_its_own() -> None:
    first = network()
    checkpoint_activations(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    x = torch.randn(2, 1, 8, 8)
    given = (x, torch.full((2,), 500.0), torch.zeros(2, dtype=torch.long))
    assert not second(*given).any()
    assert first(*given).any()
    assert first.state_dict().keys() == network().state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "world"),
    [("single", 1), ("fsdp", 2), pytest.param("ddp", 2, marks=pytest.mark.slow)],
)
def test_training_with_recomputed_activations_is_the_same_training(kind: str, world: int) -> None:
    (expected,) = trained(1, "single", "adversarial")
    for found in trained(world, kind, "adversarial", checkpoint_activations=True):
        assert_same_run(found, expected)


@pytest.mark.slow
def test_hybrid_sharding_trains_as_one_device_does() -> None:
    (expected,) = trained(1, "single", "adversarial")
    for found in trained(4, "hybrid", "adversarial"):
        assert found[2]
        assert_same_run(found, expected)


@pytest.mark.parametrize(
    ("kind", "world", "shard_frozen"),
    [
        ("single", 1, True),
        ("fsdp", 2, True),
        pytest.param("ddp", 2, True, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, False, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_teacher_in_half_precision_teaches_about_the_same(
    kind: str, world: int, shard_frozen: bool
) -> None:
    (exact,) = trained(1, "single", "adversarial", updates=1)
    options: dict[str, Any] = {"frozen_precision": "bfloat16", "shard_frozen": shard_frozen}
    for weights, losses, _ in trained(world, kind, "adversarial", updates=1, **options):
        assert all(value.dtype == torch.float32 for value in weights.values())
        assert losses[0] != exact[1][0]
        assert losses[0] == pytest.approx(exact[1][0], rel=0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        *(("single", 1), ("fsdp", 2)),
        *(pytest.param(k, n, marks=pytest.mark.slow) for k, n in (("ddp", 2), ("hybrid", 4))),
    ],
)
def test_mixed_precision_keeps_float32_weights_and_about_the_same_losses(
    kind: str, world: int
) -> None:
    (exact,) = trained(1, "single", "adversarial", updates=2)
    for weights, losses, _ in trained(
        world, kind, "adversarial", updates=2, precision="bf16-mixed"
    ):
        assert all(value.dtype == torch.float32 for value in weights.values())
        for mine, theirs in zip(losses, exact[1], strict=True):
            assert mine != theirs
            assert mine == pytest.approx(theirs, rel=0.1, abs=2e-3)


def test_frozen_roles_that_are_not_sharded_are_whole_on_each_rank() -> None:
    (expected,) = trained(1, "single", "pcm")
    for found in trained(2, "fsdp", "pcm", shard_frozen=False):
        assert found[2]
        assert_same_run(found, expected)


def times_seen(kind: str, world: int) -> list[float]:
    """All times at which the student is evaluated."""
    seen: list[float] = []
    module = method("lcm")
    trainer = trainer_of(kind, world, 3, precision="bf16-mixed")
    forward = DiT.forward

    def listen(self: DiT, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return forward(self, x_t, t, **cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiT, "forward", listen)
        trainer.fit(module, Data())
    return seen


def test_times_are_not_rounded_by_mixed_precision() -> None:
    grid = {50.0 * n - 1 for n in range(1, 21)} | {0.0}
    for seen in run_ranks(2, times_seen, "fsdp", 2):
        assert len(seen) > 10
        assert set(seen) <= grid  # bfloat16 has no 949


def sampled_while_training(kind: str, world: int, name: str) -> bool:
    """Whether the average can be updated after it has sampled."""
    module = method(name, **({"target_network": "ema"} if name == "lcm" else {}))
    trainer = trainer_of(kind, world, 3, SamplesEachUpdate())
    trainer.fit(module, Data())
    assert module.ema is not None
    return all(isinstance(p, DTensor) for p in module.ema.parameters())


class SamplesEachUpdate(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        labels = {"class_labels": torch.tensor([1, 2])}
        noise = torch.zeros(2, *pl_module.sample_shape)
        pl_module.sample(noise, labels, 2, role="ema")


@pytest.mark.parametrize("name", [pytest.param("lcm", marks=pytest.mark.slow), "adversarial"])
def test_a_sharded_average_goes_on_after_it_has_sampled(name: str) -> None:
    assert run_ranks(2, sampled_while_training, "fsdp", 2, name) == [True, True]


def test_frozen_weights_stay_in_float32_where_their_library_says_so(tmp_path: Path) -> None:
    denoiser = load_denoiser_of(save_wan(tmp_path), (16, 16), 5).denoiser
    exact = copy.deepcopy(denoiser)
    keep_in(denoiser, torch.bfloat16)
    found = {name: p.dtype for name, p in denoiser.backbone.network.named_parameters()}
    low = {name for name, dtype in found.items() if dtype == torch.bfloat16}
    assert any("attn" in name for name in low)
    assert not any("time_embedder" in name or "norm2" in name for name in low)
    assert all(b.dtype != torch.bfloat16 for b in denoiser.backbone.buffers())
    x, t = torch.randn(2, *denoiser.sample_shape), torch.tensor([999.0, 500.0])
    cond = {"encoder_hidden_states": torch.randn(2, 8, 16)}
    with torch.no_grad():
        close, expected = denoiser(x, t, cond).x0, exact(x, t, cond).x0
    assert not torch.equal(close, expected)
    torch.testing.assert_close(close, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
def test_precisions_that_lose_small_updates_are_refused(precision: str) -> None:
    with pytest.raises(FewstepError, match=r"bf16-mixed"):
        check_precision(precision)


@pytest.mark.parametrize("name", ["teacher", "gated", "lcm", "adversarial", "mcm", "apt"])
def test_roles_are_built_on_the_cpu_whatever_the_default_device_is(name: str) -> None:
    """Lightning builds under the accelerator's device, but host tables index one another."""
    plain, elsewhere = method(name), method(name)
    plain.configure_model()
    with torch.device("meta"):
        elsewhere.configure_model()
    expected = plain.state_dict()
    for key, value in elsewhere.state_dict().items():
        assert torch.equal(value, expected[key]), key
    phases = getattr(elsewhere, "phases", None)
    assert phases is None or phases.edges.home.device.type == "cpu"

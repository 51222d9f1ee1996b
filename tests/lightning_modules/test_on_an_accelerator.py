"""Training and sampling on a device that is not here: nothing is elsewhere, nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.networks.lora import LoRA
from fewstep.seeding import torch_generator
from lightning_modules import FewStepModule

from accelerators import DEVICE, batch_on_device, on_accelerator
from training_runs import Stream, data_for, method

pytestmark = pytest.mark.threads  # a device has a thread of its own, even one that is not there

OPTIONS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "gated": {},
    "variances": {},
    "lcm": {},
    "pcm": {},
    "adversarial": {},
    "mcm": {},
    "apt": {},
    "lcm with adapters": {"lora": LoRA(rank=2, dropout=0.1)},
    "pcm with an average as target": {"target_network": "ema"},
}
FAST = ("adversarial", "lcm with adapters")
CASES = [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in OPTIONS]


def built(case: str) -> tuple[str, FewStepModule]:
    name = case.partition(" ")[0]
    module = method(name, accumulate=2, **OPTIONS[case])
    module.configure_model()
    return name, module


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_keeps_to_the_device_and_never_waits_for_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, module = built(case)
    batch = next(iter(Stream(data_for(name), 0, 1, 0)))
    with on_accelerator(module, monkeypatch) as transfers:
        there = batch_on_device(batch)
        module.training_step(there, 0)
        transfers.to_device.clear()  # tables come with the first step, and stay
        module.training_step(there, 1)
        assert all(p.device == DEVICE for p in module.student.parameters())
        assert any(p.grad is None for p in module.student.parameters())  # the step was taken
    assert not transfers.to_host
    assert not transfers.to_device


@pytest.mark.parametrize("case", CASES)
def test_a_sample_is_made_on_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module = built(case)
    batch = next(iter(Stream(data_for(name), 0, 1, 0)))
    cpu = [torch_generator(0, "sampler", n) for n in range(len(batch["sample"]))]
    with on_accelerator(module, monkeypatch) as transfers, torch.no_grad():
        there = batch_on_device(batch)
        for num_steps in module.step_counts():
            found = module.sample(there["sample"], there["cond"], num_steps, cpu)
            assert found.device == DEVICE
    assert not transfers.to_host


def test_the_watch_itself_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = built("teacher")
    with on_accelerator(module, monkeypatch) as transfers:
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="found at least two devices"):
            here + there
        with pytest.raises(AssertionError, match="indexed on the device"):
            here[torch.arange(2, device=DEVICE)]
        for waits in (lambda: there.sum().item(), lambda: there[there > 0], lambda: bool(there[0])):
            with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
                waits()
        there.cpu()
        here.to(DEVICE)
        assert (len(transfers.to_host), len(transfers.to_device)) == (1, 1)

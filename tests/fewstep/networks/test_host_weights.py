"""Weights that are lent to a device: nothing is copied back, nothing is lost, ties hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.networks import host_weights
from fewstep.networks.host_weights import HOST, HostWeights
from fewstep.networks.text import TextEncoding

from tiny_pipelines import save_stable_diffusion

ELSEWHERE = torch.device("cpu:0")  # another device than HOST, to those who compare


class Copies:
    """Counts what goes to a device, of which the CPU's own memory is a stand-in."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, master: Tensor, device: torch.device) -> Tensor:
        assert device == ELSEWHERE
        self.made += 1
        return master.clone()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    counted = Copies()
    monkeypatch.setattr(HostWeights, "_copied", staticmethod(counted))
    return counted


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Tied(nn.Module):
    """Weights tied as one parameter and as two over one memory, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.view = (nn.Linear(3, 3) for _ in range(3))
        self.same.weight = self.first.weight
        self.view.weight = nn.Parameter(self.first.weight.data)
        self.register_buffer("table", torch.arange(4.0))
        self.requires_grad_(False)


def places(module: nn.Module) -> dict[str, int]:
    held = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name: tensor.data_ptr() for name, tensor in held}


def test_coming_back_is_pointing_at_what_never_left(copies: Copies) -> None:
    module = Tied()
    before = places(module)
    values = {name: value.clone() for name, value in module.state_dict().items()}
    host = HostWeights([module])
    for _ in range(2):
        host.to(ELSEWHERE)
        assert not set(places(module).values()) & set(before.values())
        with Operations() as operations:
            host.to(HOST)
        assert operations.seen == []
        assert places(module) == before
    assert all(torch.equal(module.state_dict()[name], value) for name, value in values.items())


def test_tied_weights_are_copied_once_and_stay_tied(copies: Copies) -> None:
    module = Tied()
    host = HostWeights([module])
    host.to(ELSEWHERE)
    assert copies.made == 5, "one weight, three biases, one table"
    assert module.same.weight is module.first.weight
    assert module.view.weight.data_ptr() == module.first.weight.data_ptr()
    host.to(ELSEWHERE)
    assert copies.made == 5, "they are there already"


def test_locked_memory_takes_the_place_of_the_ordinary(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which only a machine with CUDA has: what stands for it here is other memory."""
    module = Tied()
    before, values = places(module), {n: v.clone() for n, v in module.state_dict().items()}
    monkeypatch.setattr(host_weights, "_pinned", torch.Tensor.clone)
    host = HostWeights([module])
    locked = places(module)
    assert not set(locked.values()) & set(before.values())
    assert locked["view.weight"] == locked["first.weight"]
    host.to(ELSEWHERE)
    host.to(HOST)
    assert places(module) == locked
    assert all(torch.equal(module.state_dict()[name], value) for name, value in values.items())


def test_prompts_mean_the_same_wherever_the_encoders_are(tmp_path: Path, copies: Copies) -> None:
    folder = save_stable_diffusion(tmp_path)
    expected = TextEncoding(folder).encode(["a b"])["encoder_hidden_states"]
    text = TextEncoding(folder, kept=True)
    encoder = text.pipeline.text_encoder
    before = places(encoder)
    for _ in range(2):
        assert torch.equal(text.to(ELSEWHERE).encode(["a b"])["encoder_hidden_states"], expected)
        assert not set(places(encoder).values()) & set(before.values())
        text.offload()
        assert places(encoder) == before
    assert copies.made == 2 * len(set(before.values()))


def test_encoders_that_never_leave_the_host_are_not_touched(tmp_path: Path, copies: Copies) -> None:
    text = TextEncoding(save_stable_diffusion(tmp_path), kept=True)
    text.encode(["a b"])
    text.offload()
    assert copies.made == 0

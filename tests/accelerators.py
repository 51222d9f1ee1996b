"""An accelerator that is not there: tensors without values that know where they would be.

Operations on tensors of two devices fail as they would with CUDA, and so does every value the host
asks for. What they cannot show is whether kernels compute the right thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.contracts import Batch
from lightning_modules import FewStepModule

DEVICE = torch.device("lazy", 0)  # autograd knows no CUDA without a driver


class DeviceGenerator(torch.Generator):
    """A generator that says it is on the device; numbers drawn from it have no values anyway."""

    device = DEVICE

    def __new__(cls, device: Any = None) -> DeviceGenerator:
        return super().__new__(cls)

    def manual_seed(self, seed: int) -> DeviceGenerator:
        super().manual_seed(seed)
        return self


class Transfers(TorchDispatchMode):
    """Notes copies between host and device; refuses indices that CUDA refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index" in str(func) and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
            places = [one for one in torch.utils._pytree.tree_leaves(args) if _on_device(one)]
            assert not places, f"{func}: a tensor of the host, indexed on the device"
        found = func(*args, **(kwargs or {}))
        if str(func).startswith("aten._to_copy") and isinstance(found, Tensor):
            was, now = args[0].device.type, found.device.type
            if (was, now) == (DEVICE.type, "cpu"):
                self.to_host.append(str(func))
            elif (was, now) == ("cpu", DEVICE.type):
                self.to_device.append(f"{tuple(found.shape)} {found.dtype}")
        return found


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE.type


class Optimizer:
    """What a method uses of Lightning's wrapper."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


@contextmanager
def on_accelerator(module: FewStepModule, monkeypatch: Any) -> Iterator[Transfers]:
    """A built method whose ``training_step`` runs as on one device, without a trainer."""
    monkeypatch.setattr(torch, "Generator", DeviceGenerator)
    autocast = torch.autocast  # which knows the kinds of devices by name
    monkeypatch.setattr(torch, "autocast", lambda _kind, **options: autocast("cpu", **options))
    module._device = DEVICE
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Transfers() as transfers:
        move(module, fakes)
        module._trainer = stub = cast(
            Any,
            SimpleNamespace(
                world_size=1,
                global_rank=0,
                global_step=0,
                max_steps=10,
                strategy=SimpleNamespace(optimizer_step=lambda one, closure, model: one.step()),
            ),
        )
        made, schedulers = module.configure_optimizers()
        stub.optimizers = made
        monkeypatch.setattr(module, "optimizers", lambda: [Optimizer(one) for one in made])
        monkeypatch.setattr(module, "lr_schedulers", lambda: schedulers)
        monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
        monkeypatch.setattr(module, "manual_backward", lambda loss, **kw: loss.backward(**kw))
        transfers.to_device.clear()
        yield transfers


def move(module: nn.Module, fakes: FakeTensorMode) -> None:
    """Puts every parameter and buffer on the device, shared ones once."""
    memo: dict[int, Any] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            moved = fakes.from_tensor(tensor.detach()).to(DEVICE)
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if trained else moved
        found: Tensor = memo[id(tensor)]
        return found

    for one in module.modules():
        for held in (one._parameters, one._buffers):
            held.update({n: there(t) for n, t in held.items() if t is not None})


def batch_on_device(batch: Batch) -> Batch:
    """A batch as a strategy hands it to a training step."""

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(DEVICE)
        return (
            {name: there(one) for name, one in value.items()} if isinstance(value, dict) else value
        )

    found: Batch = there(batch)
    return found

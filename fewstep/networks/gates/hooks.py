"""How gates come into a forward pass: hooks that find the gate in the module they are called for.

They are functions of this module, the same for all gates. So a copy of a network has gates of its
own, and a pickle of it names these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.networks.gates.blocks import argument_of
from fewstep.networks.gates.gate import FuseGate, Gate, SkipGate
from fewstep.networks.gates.precision import (
    IN_FLOAT32,
    STREAMS,
    check_streams,
    narrow_input,
    widen_streams,
)
from fewstep.networks.gates.sites import GATE, GATE_NAMES, SKIPS, TEXT_GATE
from fewstep.networks.gates.time import enter_time, leave_time


def gate_branch(layer: Any, _args: Sequence[Any], output: Tensor) -> Tensor:
    """Forward hook of a branch's last layer."""
    gated: Tensor = layer.rdm_gate(output)
    return gated


def gate_block(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook of a block: gates its update of each stream that has a gate."""
    for name in (GATE, TEXT_GATE):
        gate = getattr(block, name, None)
        if gate is None:
            continue
        at = gate.stream.output
        before = argument_of(gate.stream.argument, gate.position, args, kwargs)
        if at is None:
            output = gate(output, before)
        else:
            output = (*output[:at], gate(output[at], before), *output[at + 1 :])
    return output


def gate_skips(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an up block, which is given its skips by name or by position."""
    if SKIPS in kwargs:
        return args, {**kwargs, SKIPS: block.rdm_skip(kwargs[SKIPS])}
    at = block.rdm_skip.position
    return (*args[:at], block.rdm_skip(args[at]), *args[at + 1 :]), kwargs


def gate_fused(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of a U-ViT's fuse map."""
    return (layer.rdm_skip(args[0]), *args[1:])


HOOKS = (
    *(gate_branch, gate_block, gate_skips, gate_fused, enter_time, leave_time),
    *(widen_streams, check_streams, narrow_input),
)


def hang(module: nn.Module, name: str, gate: Gate | SkipGate | FuseGate) -> None:
    """Gives a layer or block its gate, and has it called."""
    hooked = any(hook is gate_block for hook in module._forward_hooks.values())
    module.add_module(name, gate.train(module.training))
    if isinstance(gate, SkipGate):
        module.register_forward_pre_hook(gate_skips, with_kwargs=True)
    elif isinstance(gate, FuseGate):
        module.register_forward_pre_hook(gate_fused)
    elif gate.stream is None:
        module.register_forward_hook(gate_branch)
    elif not hooked:  # one hook for both streams
        module.register_forward_hook(gate_block, with_kwargs=True)


def take_away(module: nn.Module) -> None:
    """Removes a module's own gates, and whatever was hooked to it for gates."""
    for name in GATE_NAMES:
        module._modules.pop(name, None)
    for name in (STREAMS, IN_FLOAT32):
        vars(module).pop(name, None)
    before: list[dict[int, Any]] = [module._forward_pre_hooks_with_kwargs]
    after: list[dict[int, Any]] = [
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    for hooks, options in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
        for key in [key for key, hook in hooks.items() if hook in HOOKS]:
            for kept in (hooks, *options):
                kept.pop(key, None)

"""What one training step costs, found by running it on tensors that hold no values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fewstep.batches import rows_of
from fewstep.contracts import Batch
from fewstep.networks import ema_update
from lightning_modules import FewStepModule
from lightning_modules.optimisation import micro_batches
from scripts.plan.judges import decoder_of, decoder_without_values
from scripts.plan.memory import LiveMemory, SavedBytes
from scripts.plan.shards import narrow, sharded_roles

aten = torch.ops.aten
REAL_PARAMETERS = 64_000_000  # at most so many are tried out with values where it needs them


def _attention(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# The fused attention of the CPU, which torch's counter leaves out, costs what that of GPUs does.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
ADAM_STATES = 2
BatchOf = Callable[[], Batch]


@dataclass(frozen=True)
class StepCost:
    """What one device does and needs in a student update, without the roles' own memory.

    Attributes:
        flops: floating-point operations of all forward and backward passes; a multiply-add is two.
        saved: bytes kept for the backward pass, by the role that is trained by it.
        activations: most bytes alive at a time in the passes of a micro-batch: what is saved, what
            no-grad forward passes hold at their largest, and gradients on their way.
        workspace: most temporary bytes of clipping, optimiser steps and weight averaging.
        optimizer: bytes of optimiser state, by role.
        guessed: roles whose optimiser could not be tried; two states a parameter are assumed.
    """

    flops: int
    saved: dict[str, int]
    activations: int
    workspace: int
    optimizer: dict[str, int]
    guessed: tuple[str, ...]


class _NoModules:
    """In place of a counter's tracker of modules, which fails at gradients of a module's inputs."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing to begin."""

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


def flop_counter() -> FlopCounterMode:
    """Counts the floating-point operations within it; a multiply-add is two."""
    counter: Any = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    counter.mod_tracker = _NoModules()
    return counter


def step_cost(
    model: FewStepModule, batch: BatchOf, precision: str, sharded: bool = False
) -> StepCost:
    """Runs a student update on tensors that have a shape and a dtype but no memory.

    They pass for the CPU's, so that everything chooses its operations as in a real step. A network
    that asks for a value, as only exact ones do, is run for real if it is small.

    Args:
        model: the method, with its roles on the meta device, where they stay.
        batch: makes one device's batch.
        precision: Lightning's name of it.
        sharded: whether FSDP2 gathers weights in the precision they are computed in, so that no
            casts of them are kept.
    """
    try:
        copies = _copies(model, precision, sharded)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _step_cost(*copies, batch, precision)
    except DataDependentOutputException:
        if sum(parameter.numel() for parameter in model.parameters()) > REAL_PARAMETERS:
            raise
        return _step_cost(*_copies(model, precision, sharded), batch, precision)


def gathered_in(precision: str) -> torch.dtype | None:
    """The low precision that a sharded run gathers its units in, if it has one."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def _copies(
    model: FewStepModule, precision: str, sharded: bool
) -> tuple[FewStepModule, FewStepModule]:
    """One for the passes and one for the update, with weights of the dtypes they have there."""
    passing, updating = copy.deepcopy(model), copy.deepcopy(model)
    low_precision = gathered_in(precision)
    if sharded and low_precision is not None:
        for name, role in sharded_roles(passing).items():
            if name != "ema":
                narrow(role, low_precision)
    return passing, updating


def _step_cost(
    passing: FewStepModule, updating: FewStepModule, batch_of: BatchOf, precision: str
) -> StepCost:
    passing.to_empty(device="cpu")  # which fake mode passes its tensors for
    updating.to_empty(device="cpu")
    decoder_without_values(passing)
    batch = batch_of()
    sizes = [len(part["sample"]) for _, part, _ in _split(passing, batch)]
    parts = {size: rows_of(batch, slice(0, size)) for size in set(sizes)}
    passes = {size: _passes(passing, part, precision) for size, part in parts.items()}
    return replace(
        _update(updating),
        flops=sum(passes[size].flops for size in sizes),
        saved=passes[max(sizes)].saved,
        activations=passes[max(sizes)].activations,
    )


def _split(model: FewStepModule, batch: Batch) -> list[Any]:
    return list(micro_batches(batch, model.draw(batch, torch.Generator()), model.accumulate))


def _passes(model: FewStepModule, batch: Batch, precision: str) -> StepCost:
    """The forward and backward passes of one micro-batch."""
    known = [*model.parameters(), *model.buffers()]
    if (vae := decoder_of(model)) is not None:
        known += vae.parameters()
    memory, saved_bytes, saved = LiveMemory(known), SavedBytes(known), dict[str, int]()
    model.zero_grad(set_to_none=True)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: memory.hand_over(p.grad))
        for role in model.trained_roles
        for parameter in model._parameters_of(role)
    ]
    flops = flop_counter()
    dtype = AUTOCAST.get(precision, torch.bfloat16)
    autocast = torch.autocast("cpu", dtype, enabled=precision in AUTOCAST)
    model.train()
    with flops, memory, saved_bytes.counted(), autocast:
        draws = model.draw(batch, torch.Generator())
        for update in model.updates(batch, draws):
            saved[update.role] = saved_bytes.take()
            roles = (update.role, *update.also)
            update.loss.backward(inputs=[p for role in roles for p in model._parameters_of(role)])
    for hook in hooks:
        hook.remove()
    return StepCost(flops.get_total_flops(), saved, memory.peak, 0, {}, ())


def _update(model: FewStepModule) -> StepCost:
    """Clipping, optimiser steps and averaging."""
    memory = LiveMemory([*model.parameters(), *model.buffers()])
    states, guessed, workspace = dict[str, int](), list[str](), 0
    for role in model.trained_roles:
        parameters = model._parameters_of(role)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        try:
            optimizer = _grouped(model.make_optimizer[role](parameters))
            with memory:
                optimizer.step()  # makes the states; what a later step needs on top is temporary
                before, memory.peak = memory.live, memory.live
                torch.nn.utils.clip_grad_norm_(parameters, model.gradient_clip or 1.0)
                optimizer.step()
            workspace = max(workspace, memory.peak - before)
            states[role] = _state_bytes(optimizer)
        except (RuntimeError, NotImplementedError, TypeError):
            states[role] = ADAM_STATES * sum(p.numel() * p.element_size() for p in parameters)
            guessed.append(role)
    if model.ema is not None:
        with memory:
            memory.peak = before = memory.live
            ema_update(model.ema, model.student, 0.5)
        workspace = max(workspace, memory.peak - before)
    return StepCost(0, {}, 0, workspace, states, tuple(guessed))


def _grouped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser as it would be on a GPU, where it treats all tensors at once by default."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all states that grow with the parameters; step counters do not."""
    entries = [value for state in optimizer.state.values() for value in state.values()]
    return sum(e.numel() * e.element_size() for e in entries if isinstance(e, Tensor) and e.ndim)

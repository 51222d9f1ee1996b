"""What is done to roles once they are built: precision, checkpointing, compilation, sharding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError
from fewstep.networks.gates.jacobian import carries_tangent
from fewstep.networks.lora import pinned

RECOMPILATIONS = 64  # of the code that blocks of one class share, in all roles together
FULL_PRECISION = ("64-true", "32-true", "bf16-mixed")


def check_precision(precision: str) -> None:
    """Refuses precisions in which weights, averages and optimisers would not be float32.

    Float16 with float32 weights too: its loss scale, which several optimisers would share, is in
    the gradients when they are clipped.

    Raises:
        FewstepError: for such a precision.
    """
    if precision == "16-mixed":
        raise FewstepError(
            "trainer.precision is 16-mixed, whose gradients are multiplied by a loss scale, which "
            "clipping and several optimisers do not go together with here. Use bf16-mixed, or "
            "32-true on devices without bfloat16."
        )
    if precision not in FULL_PRECISION:
        raise FewstepError(
            f"trainer.precision is {precision}, which keeps weights, their average and the "
            "optimiser's state in low precision, where small updates are lost. Use bf16-mixed: it "
            "computes in bfloat16 and keeps float32 weights."
        )


def keep_in(role: nn.Module, dtype: torch.dtype) -> None:
    """Keeps a frozen role's weights in a dtype, except where its library says float32.

    Buffers stay as they are: they are tables of positions, which low precision would move.
    """
    for backbone in backbones(role):
        network = getattr(backbone, "network", backbone)
        exempt = set(getattr(network, "_keep_in_fp32_modules", None) or ())
        for name, parameter in backbone.named_parameters():
            if not exempt.intersection(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        backbone.kept_in = dtype


class _Checkpointed:
    """Mixed into a block's class: keeps the block's input and computes the rest once more.

    A class, rather than a replaced ``forward``, so that copies of the block are whole.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled() or carries_tangent(*args, *kwargs.values()):
            return inner(*args, **kwargs)
        # Computed once more with the adapter it was computed with, whichever role ran since.
        return checkpoint(pinned(inner), *args, use_reentrant=False, **kwargs)


def checkpoint_activations(role: nn.Module) -> None:
    """Recomputes each block's activations in the backward pass instead of keeping them.

    Non-reentrant, so that a discriminator may look inside, gradients may be asked for by name and
    FSDP2 may gather a block for its recomputation.
    """
    for block in _blocks(role):
        kind = type(block)
        if not issubclass(kind, _Checkpointed):
            block.__class__ = type(kind.__name__, (_Checkpointed, kind), {})


def compile_blocks(role: nn.Module) -> None:
    """Compiles each block on its own: short to compile, and blind to what happens around it."""
    # Blocks of one class share the limit; beyond it dynamo goes on uncompiled, with but a warning.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILATIONS)
    for block in _blocks(role):
        block.compile()


def _blocks(role: nn.Module) -> Iterator[nn.Module]:
    for backbone in backbones(role):
        for name in backbone.feature_blocks:
            yield backbone.get_submodule(name)


def backbones(role: nn.Module) -> Sequence[Backbone]:
    """The networks within a role."""
    return [module for module in role.modules() if isinstance(module, Backbone)]

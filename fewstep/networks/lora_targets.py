"""Options of a LoRA, and which layers of a network it adapts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fewstep.diffusion.denoiser import Backbone
from fewstep.errors import FewstepError, nearest

# Both streams of joint attention where there are two.
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2"),
    *("ff_context.net.0.proj", "ff_context.net.2"),
    *("ffn.net.0.proj", "ffn.net.2"),
)
RESNETS = (
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)
# What few-step LoRAs of U-Nets adapt: LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) in diffusers'
# train_lcm_distill_lora script, PCM (Wang et al. 2024) and, for videos, MCM (Zhai et al. 2024),
# all the same. Of transformers it is attention and feed-forward networks of all streams, as in
# diffusers' LoRA scripts of SD3 and Flux. PCM's SD3 students adapt embeddings and the linear layers
# of adaLN too, which their experiments name.
# None of them has an input for the guidance scale; where a U-Net has one, it is adapted too.
GUIDANCE_INPUT = "cond_proj"
UNET_TARGETS = (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", *RESNETS, GUIDANCE_INPUT)
TRANSFORMER_TARGETS = (*ATTENTION, *FEED_FORWARD)
TARGETS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": UNET_TARGETS,
    "UNet3DConditionModel": UNET_TARGETS,
    # Without the motion modules' projections, whose input is named in a way that peft's layers do
    # not know: a file with them would be of no use in diffusers.
    "UNetMotionModel": (*ATTENTION, *FEED_FORWARD, *RESNETS, GUIDANCE_INPUT),
}

_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on frozen weights: ``W + (alpha / rank) B A`` (Hu et al. 2021).

    Args:
        rank: rank of ``B A``. LCM-LoRA and PCM's SDXL and SD1.5 students use 64, its SD3 ones 32.
        alpha: sets the adapters' scale ``alpha / rank``; null is ``rank``, so a scale of 1. (PCM
            trained with 8, which goes with its learning rates.)
        target_modules: ends of names of layers, such as ``to_q`` or ``attn1.to_q``, or one regular
            expression that whole names must match; null takes what is usual for the network.
        dropout: share of each adapter's inputs that is dropped in training. Which is a function of
            (seed, update, rank), so that runs resume exactly.
        init: how ``A`` is drawn: ``kaiming`` as a linear layer's weights, or ``gaussian`` with a
            standard deviation of ``1 / rank``. ``B`` starts at zero.
    """

    rank: int = 64
    alpha: float | None = None
    target_modules: list[str] | str | None = None
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.scale <= 0 or not 0 <= self.dropout < 1:
            raise FewstepError(
                "A LoRA needs a rank of at least 1, an alpha above 0 and a dropout from 0 to below "
                f"1, not rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}."
            )

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def inner_network(backbone: Backbone) -> nn.Module:
    """The network that a backbone holds; the backbone itself if it is one of its own.

    Names of layers start there, as in the network's own files.
    """
    children = list(backbone.children())
    return children[0] if len(children) == 1 else backbone


def find_targets(
    network: nn.Module, wanted: list[str] | str | None
) -> tuple[list[str] | str, list[str]]:
    """The patterns in use and the names of the layers that they match, in the network's order.

    Args:
        wanted: see :class:`LoRA`; each pattern that is named must match.

    Raises:
        FewstepError: if one matches no linear or convolutional layer.
    """
    layers = adaptable_layers(network)
    if isinstance(wanted, str):
        try:
            expression = re.compile(wanted)
        except re.error as error:
            raise FewstepError(
                f"lora.target_modules is no regular expression ({error}): '{wanted}'. To name ends "
                "of layers' names, give a list."
            ) from error
        found = [name for name in layers if expression.fullmatch(name)]
        if not found:
            raise _no_match(network, wanted, layers)
        return wanted, found
    patterns = list(wanted if wanted is not None else _usual(network))
    matching = [p for p in patterns if any(_ends_with(name, p) for name in layers)]
    missing = [p for p in patterns if p not in matching]
    if missing and (wanted is not None or not matching):
        raise _no_match(network, missing[0], layers)
    if not matching:
        raise FewstepError("lora.target_modules is empty; null takes what is usual.")
    return matching, [n for n in layers if any(_ends_with(n, p) for p in matching)]


def adaptable_layers(network: nn.Module) -> list[str]:
    """Names of the linear and the ungrouped convolutional layers."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _ADAPTABLE) and getattr(module, "groups", 1) == 1
    ]


def _usual(network: nn.Module) -> Sequence[str]:
    names = (cls.__name__ for cls in type(network).__mro__)
    return next((TARGETS[n] for n in names if n in TARGETS), TRANSFORMER_TARGETS)


def _ends_with(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _no_match(network: nn.Module, pattern: str, layers: Iterable[str]) -> FewstepError:
    kinds = sorted({_kind(name) for name in layers})
    ends = {kind.split(".", 1)[-1] for kind in kinds}
    shown = ", ".join(kinds[:40]) + (f" and {len(kinds) - 40} more" if len(kinds) > 40 else "")
    return FewstepError(
        f"lora.target_modules: no linear or convolutional layer of {type(network).__name__} is "
        f"named '{pattern}'.{nearest(pattern, {*kinds, *ends})} Its layers end in: "
        f"{shown or 'none'}."
    )


def _kind(name: str) -> str:
    """What is behind the last list of blocks that a layer is in: ``attn1.to_out.0``."""
    parts = name.split(".")
    blocks = [i for i, part in enumerate(parts) if i and part.isdigit() and _many(parts[i - 1])]
    return ".".join(parts[blocks[-1] + 1 :] if blocks else parts) or name


def _many(name: str) -> bool:
    """Whether a list of this name holds blocks, rather than the layers of one."""
    return name.endswith("s") and not name.endswith("samplers")

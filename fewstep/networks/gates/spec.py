"""Options of residual gates."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fewstep.errors import FewstepError
from fewstep.spec import Change

Mode = Literal["none", "alpha", "beta", "alpha_beta", "alpha_rho", "full"]
Level = Literal["branch", "block"]
Init = Literal["identity", "depth", "ode", "zero"]


@dataclass(frozen=True)
class ResidualGates(Change):
    """Learnable gates on a network's residual units: ``z <- rho z + alpha F(z) + beta``.

    Neural Residual Diffusion (Ma et al. 2024, arXiv 2406.13215) has ``z + alpha F(z) + beta``; what
    is stored are differences from the ungated network, so gates of zeros change nothing. Shapes,
    initial values and places are this project's choice.

    Args:
        mode: which of alpha, beta and rho there are: ``alpha_rho`` is what a DDIM step needs,
            ``full`` all three, ``none`` no gates at all, to compare with.
        level: ``branch`` gates what each attention, feed-forward or convolutional branch gives,
            before the block's own modulation, and can be merged into the weights; ``block`` gates a
            whole block's update of its stream: ``y + delta (y - z) + kappa z + beta``. Beta is
            multiplied by adaLN's gate in the former and not in the latter, and only the latter
            knows the stream, which rho needs.
        alpha_shape: one alpha a gate, or one a channel.
        init: where alpha starts: ``identity`` at 1; ``depth`` at ``1 / sqrt(n)`` for ``n`` gated
            units that add to the same stream, for training from scratch without adaLN-Zero; ``ode``
            at ``1 / n``, the step of an Euler solver; ``zero`` at 0 (ReZero, Bachlechner et al.
            2020). All but the first would spoil trained weights.
        stream_dtype: ``float32`` keeps the residual streams of all known blocks in float32 where
            branches compute in half precision, under autocast or with weights in half precision;
            a U-ViT's fuse maps, through which all of its stream passes, then compute in float32.
            ``same`` leaves them as they are. In float32 there is no difference.
        skip: whether the long skips of U-shaped networks get gates too: ``(1 + sigma) skip``. A
            resnet block whose norm has groups of the skip's channels alone sees such a factor in
            its shortcut only.
        time_conditioned: whether alpha and beta also depend on the time, by linear maps of its
            sines and cosines that start at zero. Networks with adaLN have that already.
        include: regular expressions, each found in the names of the units to gate, or the class of
            their blocks (or one it derives from), such as ``ResnetBlock2D``; null is all, of a
            network whose blocks are all known. At the branch level one that is in none of these
            names may name other linear and convolutional layers.
        exclude: the same of units that stay as they are.

    Raises:
        FewstepError: for options that contradict each other.
    """

    mode: Mode = "alpha_beta"
    level: Level = "branch"
    alpha_shape: Literal["scalar", "channel"] = "scalar"
    init: Init = "identity"
    stream_dtype: Literal["same", "float32"] = "same"
    skip: bool = False
    time_conditioned: bool = False
    include: list[str] | None = None
    exclude: list[str] | None = None

    def __post_init__(self) -> None:
        if self.has_rho and self.level == "branch":
            raise FewstepError(
                f"gates.mode {self.mode} has a rho, which scales the block's stream; a branch does "
                "not see it. Set gates.level: block, or a mode without rho."
            )
        if self.init != "identity" and not self.has_alpha:
            raise FewstepError(
                f"gates.init {self.init} says where alpha starts, and gates.mode {self.mode} has "
                "no alpha; set gates.init: identity."
            )
        if self.time_conditioned and not (self.has_alpha or self.has_beta):
            raise FewstepError(
                "gates.time_conditioned makes alpha and beta depend on the time, and gates.mode "
                f"{self.mode} has neither."
            )
        if self.stream_dtype == "float32" and self.mode == "none":
            raise FewstepError(
                "gates.stream_dtype float32 comes with gates, and gates.mode none has none. Set "
                "gates.mode: alpha; with gates.init: identity it changes nothing else."
            )
        for pattern in [*(self.include or ()), *(self.exclude or ())]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FewstepError(
                    f"gates.include and gates.exclude take regular expressions, and '{pattern}' is "
                    f"none ({error})."
                ) from error

    @property
    def has_alpha(self) -> bool:
        """Whether gates scale the branch."""
        return self.mode not in ("none", "beta")

    @property
    def has_beta(self) -> bool:
        """Whether gates add to it."""
        return self.mode in ("beta", "alpha_beta", "full")

    @property
    def has_rho(self) -> bool:
        """Whether gates scale the stream."""
        return self.mode in ("alpha_rho", "full")

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return asdict(self)

    def apply_to(self, thing: Any) -> None:
        """Puts gates that change nothing on a network that was just built.

        Their values come with its weights, so where they once started is of no matter.
        """
        from fewstep.networks.gates.apply import install  # noqa: PLC0415 - it reads these options

        install(thing, self)

"""A backbone together with the schedule and prediction type that give its output a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, PredictionType, to_prediction
from fewstep.diffusion.schedules import Schedule
from fewstep.diffusion.tables import expand_to, work_dtype
from fewstep.errors import FewstepError
from fewstep.spec import Change, Spec, build, describe

Cond = Mapping[str, Tensor]


class Backbone(nn.Module):
    """A network behind one face: ``forward(x_t, t, **cond)`` returns an output shaped like ``x_t``.

    Or, with ``learned_variance``, twice its channels: the second half tells where each value's
    variance lies (see :mod:`fewstep.diffusion.ancestral`).

    Attributes:
        config: plain constructor arguments (see :mod:`fewstep.spec`).
        sample_shape: shape of one sample, ``(C, H, W)``, ``(C, F, H, W)`` or ``(D,)``.
        feature_blocks: names of the sub-modules whose outputs serve a discriminator, with the
            number of channels of each.
        shard_units: names of the sub-modules that FSDP2 gathers one at a time; what is in none of
            them is gathered for the whole forward pass.
        guidance_input: name of the conditioning that takes a guidance-scale embedding, if any.
        added_layer: name of the layer, all zeros at first, that was added for this input.
        kept_in: what most of its weights are kept in, if that was decided for it.
        changes: what was done to it after it was built, such as gates on its residual branches.
        learned_variance: whether it tells the variances of the reverse process too.
    """

    config: dict[str, Any]
    sample_shape: tuple[int, ...]
    guidance_input: str | None = None
    added_layer: str | None = None
    kept_in: torch.dtype | None = None
    changes: tuple[Change, ...] = ()
    learned_variance: bool = False

    @property
    def feature_blocks(self) -> dict[str, int]:
        return {}

    @property
    def shard_units(self) -> list[str]:
        return list(self.feature_blocks)

    @property
    def low_precision(self) -> torch.dtype | None:
        """The half precision its weights are kept in, if they are."""
        dtype = self.kept_in or next((p.dtype for p in self.parameters()), None)
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    def feature(self, output: Any) -> Tensor:
        """The feature in what one of the feature blocks returns: tokens or a map."""
        feature: Tensor = output[0] if isinstance(output, tuple) else output
        return feature

    def token_mask(self, x_t: Tensor, cond: Cond) -> Tensor | None:
        """Which tokens of the feature blocks are a sample's own, bool ``(B, N)``; None is all.

        For networks whose batches are padded to a common length.
        """
        return None

    def add_guidance_input(self, dim: int) -> None:
        """Gives the network a ``guidance_input (B, dim)``, unless it has one of its own.

        What it computes stays the same, to the bit, until the new layer is trained.

        Raises:
            FewstepError: if there is no such option.
        """
        if self.guidance_input is None:
            raise FewstepError(
                f"{type(self).__name__} takes no guidance embedding; set guidance_embedding: false."
            )

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional counterpart of ``cond``, of the same shapes."""
        raise NotImplementedError(
            f"{type(self).__name__} is unconditional: it has no null condition."
        )


class DenoiserLike(Protocol):
    """What samplers and solvers need: a network or a closed form that predicts ``(x0, eps)``."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction: ...


class Denoiser(nn.Module):
    """Predicts ``(x0, eps)`` in float32 from a noisy sample.

    Args:
        backbone: the network.
        schedule: noise schedule the network was trained with.
        prediction_type: what the network outputs.
        alpha_floor: see :func:`fewstep.diffusion.prediction.to_prediction`; 0 is off.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        prediction_type: PredictionType,
        alpha_floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self.alpha_floor = alpha_floor

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch dimension."""
        return self.backbone.sample_shape

    def outputs(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's own output, and what it says of variances, if it does; each ``(B, ...)``.

        Both are in the working precision.
        """
        work, low, given = work_dtype(x_t), self.backbone.low_precision, dict(cond or {})
        if low is not None:
            x_t = x_t.to(low)
            given = {n: c.to(low) if c.is_floating_point() else c for n, c in given.items()}
        output: Tensor = self.backbone(x_t, t.to(work), **given).to(work)
        if not self.backbone.learned_variance:
            return output, None
        channels = x_t.shape[1]
        return output[:, :channels], output[:, channels:]

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The network's own output in the working precision, ``(B, ...)``, without variances."""
        return self.outputs(x_t, t, cond)[0]

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Reads a raw output as ``(x0, eps)``."""
        alpha, sigma = self.schedule.levels(t, x_t)
        x_t = x_t.to(work_dtype(x_t))
        return to_prediction(output, x_t, alpha, sigma, self.prediction_type, self.alpha_floor)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        """One network evaluation.

        Args:
            x_t: noisy samples ``(B, ...)``.
            t: times ``(B,)``.
            cond: conditioning under the backbone's own argument names, each ``(B, ...)``.
        """
        return self.interpret(self.raw(x_t, t, cond), x_t, t)

    def with_variance(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor | None]:
        """One network evaluation, with what the network says of variances, if it does."""
        output, variance = self.outputs(x_t, t, cond)
        return self.interpret(output, x_t, t), variance

    def guided(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond | None,
        guidance_scale: float | Tensor,
        detach_null: bool = False,
        channels: int | None = None,
    ) -> Prediction:
        """Classifier-free guidance in one batched pass (Ho & Salimans 2022).

        Args:
            guidance_scale: the usual scale ``g`` in ``uncond + g (cond - uncond)``, a number or
                ``(B,)``. 1 is off and costs a single evaluation. (The LCM and PCM papers' ``w`` is
                ``g - 1``.)
            detach_null: no gradient through the unconditional branch, which is then a pass of its
                own that keeps no activations.
            channels: guide so many channels of the output alone; the others are the conditional
                branch's. DiT's sampler guides the first three of a latent's four.
        """
        if cond is None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1):
            return self(x_t, t, cond)
        branches, _ = self._branches(x_t, t, cond, detach_null)
        return self.interpret(_combined(*branches, guidance_scale, channels), x_t, t)

    def guided_with_variance(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond | None,
        guidance_scale: float,
        channels: int | None = None,
    ) -> tuple[Prediction, Tensor | None]:
        """What :meth:`guided` gives, and the conditional branch's variances, if there are any."""
        if cond is None or guidance_scale == 1:
            return self.with_variance(x_t, t, cond)
        branches, variance = self._branches(x_t, t, cond, detach_null=False)
        return self.interpret(_combined(*branches, guidance_scale, channels), x_t, t), variance

    def guided_with_gap(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond | None,
        guidance_scale: float,
        detach_null: bool = False,
        channels: int | None = None,
    ) -> tuple[Prediction, Tensor | None]:
        """What :meth:`guided` gives, and what guidance adds to the predicted noise.

        That is ``g (eps_cond - eps_uncond)``, ``(B, ...)``, without a graph; None where guidance
        is off. It costs no evaluation more.
        """
        if cond is None or guidance_scale == 1:
            return self(x_t, t, cond), None
        branches, _ = self._branches(x_t, t, cond, detach_null)
        found = self.interpret(_combined(*branches, guidance_scale, channels), x_t, t)
        with torch.no_grad():
            return found, found.eps - self.interpret(branches[1], x_t, t).eps

    def _branches(
        self, x_t: Tensor, t: Tensor, cond: Cond, detach_null: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The network's outputs with and without the condition, and the variances with it."""
        null = self.backbone.null_cond(cond)
        if detach_null:
            with torch.no_grad():
                unconditional = self.raw(x_t, t, {name: null[name] for name in cond})
            conditional, variance = self.outputs(x_t, t, cond)
            return (conditional, unconditional), variance
        both = {name: torch.cat([cond[name], null[name]]) for name in cond}
        output, variance = self.outputs(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        return (conditional, unconditional), None if variance is None else variance.chunk(2)[0]

    def to_spec(self) -> Spec:
        """A plain description that :meth:`from_spec` rebuilds (without weights)."""
        return {
            "backbone": describe(self.backbone),
            "schedule": describe(self.schedule),
            "prediction_type": self.prediction_type,
            "alpha_floor": self.alpha_floor,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Denoiser:
        """Builds an untrained denoiser of the same architecture and schedule."""
        backbone: Backbone = build(spec["backbone"], Backbone)
        schedule: Schedule = build(spec["schedule"], Schedule)  # type: ignore[type-abstract]
        return cls(backbone, schedule, spec["prediction_type"], spec["alpha_floor"])


def _combined(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float | Tensor,
    channels: int | None = None,
) -> Tensor:
    """``uncond + g (cond - uncond)`` of outputs ``(B, ...)``, or of their first channels alone."""
    if isinstance(scale, Tensor):
        scale = expand_to(scale.to(conditional.dtype), conditional)
    found = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return found
    return torch.cat([found[:, :channels], conditional[:, channels:]], dim=1)


class Guided:
    """A denoiser with a fixed guidance scale, for samplers.

    Args:
        detach_null: see :meth:`Denoiser.guided`; for the gradients of training-free guidance.
        channels: see :meth:`Denoiser.guided`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance_scale: float,
        detach_null: bool = False,
        channels: int | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.guidance_scale = guidance_scale
        self.detach_null = detach_null
        self.channels = channels

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Prediction:
        return self.denoiser.guided(
            x_t, t, cond, self.guidance_scale, self.detach_null, self.channels
        )

    def with_gap(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor | None]:
        """See :meth:`Denoiser.guided_with_gap`."""
        return self.denoiser.guided_with_gap(
            x_t, t, cond, self.guidance_scale, self.detach_null, self.channels
        )

    def with_variance(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Prediction, Tensor | None]:
        """See :meth:`Denoiser.guided_with_variance`."""
        return self.denoiser.guided_with_variance(x_t, t, cond, self.guidance_scale, self.channels)

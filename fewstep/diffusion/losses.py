"""Training losses: tensors in, scalar out, float32 (float64 stays float64)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DistanceName = Literal["huber", "l2"]
Logits = Sequence[Tensor]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Mean over all elements of ``sqrt((x - y)^2 + c^2) - c`` (PCM and LCM use ``c = 1e-3``)."""
    difference = _wide(prediction) - _wide(target)
    return ((difference.square() + c * c).sqrt() - c).mean()


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of ``(x - y)^2``."""
    return F.mse_loss(_wide(prediction), _wide(target))


def distance(name: DistanceName, huber_c: float = 1e-3) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance a config names, as a function of (prediction, target)."""
    if name == "huber":
        return lambda prediction, target: pseudo_huber(prediction, target, huber_c)
    return mse


def _over_heads(terms: list[Tensor]) -> Tensor:
    """Averages each head over batch and space, then over heads: heads weigh alike."""
    return torch.stack(terms).mean()


def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """``relu(1 - D(real)) + relu(1 + D(fake))``, averaged over heads.

    Chance level is 2 (also what an untrained, zero output gives): a discriminator loss that stays
    near 2 means that fake and real are alike, not that training failed.

    Args:
        real, fake: one logit tensor a head, each ``(B, ...)``.
    """
    return _over_heads(
        [
            F.relu(1 - _wide(r)).mean() + F.relu(1 + _wide(f)).mean()
            for r, f in zip(real, fake, strict=True)
        ]
    )


def hinge_generator(fake: Logits) -> Tensor:
    """``relu(1 - D(fake))`` averaged over heads, as PCM's code has it; chance level is 1."""
    return _over_heads([F.relu(1 - _wide(f)).mean() for f in fake])


def linear_generator(fake: Logits) -> Tensor:
    """``-D(fake)`` averaged over heads: hinge's generator elsewhere (Lim & Ye 2017), and MCM's."""
    return _over_heads([-_wide(f).mean() for f in fake])


def non_saturating_discriminator(real: Logits, fake: Logits) -> Tensor:
    """``softplus(-D(real)) + softplus(D(fake))`` (Goodfellow et al. 2014); chance is ``2 ln 2``."""
    return _over_heads(
        [
            F.softplus(-_wide(r)).mean() + F.softplus(_wide(f)).mean()
            for r, f in zip(real, fake, strict=True)
        ]
    )


def non_saturating_generator(fake: Logits) -> Tensor:
    """``softplus(-D(fake))`` averaged over heads; chance is ``ln 2``."""
    return _over_heads([F.softplus(-_wide(f)).mean() for f in fake])


def relativistic_discriminator(real: Logits, fake: Logits) -> Tensor:
    """``softplus(D(fake) - D(real))``, paired along the batch (Jolicoeur-Martineau 2018)."""
    return _over_heads(
        [F.softplus(_wide(f) - _wide(r)).mean() for r, f in zip(real, fake, strict=True)]
    )


def relativistic_generator(real: Logits, fake: Logits) -> Tensor:
    """``softplus(D(real) - D(fake))``, the discriminator's game with the sides exchanged."""
    return relativistic_discriminator(fake, real)


def approximated_gradient_penalty(clean: Logits, perturbed: Logits) -> Tensor:
    """``|D(x) - D(x + sigma n)|^2``: approximated R1 on real, R2 on generated samples.

    Adversarial Post-Training (Lin et al. 2025). For small ``sigma`` and scalar logits its mean is
    ``sigma^2 |grad D|^2``. Gradient flows through both branches; the difference is taken in float32
    because it is small.
    """
    return _over_heads(
        [(_wide(c) - _wide(p)).square().mean() for c, p in zip(clean, perturbed, strict=True)]
    )


def one_centred_penalty(features: Sequence[Tensor], logits: Logits) -> Tensor:
    """``(|grad_f sum D(f)| - 1)^2``, averaged over samples: MCM's penalty on its discriminator.

    The one-centred penalty of WGAN-GP (Gulrajani et al. 2017), with respect to features instead of
    pixels; MCM's code calls it "R1", which it is not. The norm is joint over all levels of a
    sample's features, and the logits are summed over all heads. Its gradient trains the heads, by
    a second derivative through them.

    MCM takes it at mixtures of real and fake images: ``torch.lerp(real, fake, u)`` of images as the
    frozen network takes them, whose features are then made leaves.

    Args:
        features: one level each, ``(B, ...)``; leaves that require gradient.
        logits: the discriminator's scores of them, one tensor a head, ``(B, ...)``.
    """
    total = torch.stack([_wide(scores).sum() for scores in logits]).sum()
    gradients = torch.autograd.grad(total, list(features), create_graph=True)
    # Norms of norms, whose derivative at zero is zero where that of a square root is not a number.
    levels = [torch.linalg.vector_norm(_wide(g).flatten(1), dim=1) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(levels), dim=0)
    return (norm - 1).square().mean()

"""Energies of CLIP: agreement with words or pictures (FreeDoM; Shen et al. 2024), and style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.guidance.energies.base import Energy, Target, apart, needed, safe_norm, settled
from fewstep.guidance.energies.pictures import prepared
from fewstep.metrics.clip import CLIPFeatures

CLIP = "openai/clip-vit-base-patch16"


def _loaded(model: str) -> CLIPFeatures:
    features = CLIPFeatures(model)
    features.load(torch.device("cpu"))
    return features


class CLIPDistance(Energy):
    """Distance of pictures from prompts or from other pictures in CLIP's common space.

    The target is an embedding ``(N, D)`` of each sample, which :meth:`encode` makes of prompts and
    :meth:`encode_images` of pictures, once for a whole run. Pixels are in [-1, 1].

    Args:
        model: a folder of a transformers CLIP, or its name in the Hugging Face cache; nothing is
            downloaded. Do not judge samples by the same model.
        form: ``cosine`` is 1 minus the cosine; ``l2`` the distance of unnormalised embeddings, as
            the released FreeDoM has it.

    Raises:
        FewstepError: if the model is missing or damaged.
    """

    def __init__(self, model: str = CLIP, form: Literal["cosine", "l2"] = "cosine") -> None:
        if form not in ("cosine", "l2"):
            raise FewstepError(f"A CLIPDistance has the form cosine or l2, not '{form}'.")
        self.form = form
        self._features = _loaded(model)
        self.network: nn.Module = self._features.network

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Targets ``(N, D)`` of prompts."""
        network: Any = self.network
        with torch.autocast(network.device.type, enabled=False):
            return self._features.text_features(prompts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Targets ``(N, D)`` of pictures ``(N, C, H, W)`` in [-1, 1]."""
        return self._embedded(pixels)

    def _embedded(self, pixels: Tensor) -> Tensor:
        network: Any = settled(self.network, self, pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            seen = network.vision_model(
                pixel_values=prepared(pixels, self._features.preparation)
            ).pooler_output
            embedding: Tensor = network.visual_projection(seen)
        return embedding

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        what = "embeddings, from encode(prompts) or encode_images(pixels)"
        wanted = needed(target, self, what, x0)
        return apart(self._embedded(x0), wanted, self.form)


class CLIPStyle(Energy):
    """Distance of Gram matrices of a hidden layer's patch tokens (the style task of TFG).

    The target ``(N, D, D)`` is what :meth:`encode_images` makes of a picture in the wanted style.

    Args:
        model: see :class:`CLIPDistance`.
        layer: after how many blocks of the image encoder; only these are computed.
        divisor: of the distance, 100 as in TFG.

    Raises:
        FewstepError: if the model is missing or damaged, or has fewer layers.
    """

    def __init__(self, model: str = CLIP, layer: int = 2, divisor: float = 100.0) -> None:
        features = _loaded(model)
        self.network: Any = features.network.vision_model
        blocks = self.network.encoder.layers
        if not 1 <= layer <= len(blocks):
            raise FewstepError(
                f"'{model}' has layers 1 to {len(blocks)}; CLIPStyle cannot look at {layer}."
            )
        self.network.encoder.layers = blocks[:layer]
        self._preparation = features.preparation
        self.divisor = divisor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Targets ``(N, D, D)`` of pictures ``(N, C, H, W)`` in [-1, 1]."""
        return self._gram(pixels)

    def _gram(self, pixels: Tensor) -> Tensor:
        network = settled(self.network, self, pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            seen: Any = network(pixel_values=prepared(pixels, self._preparation))
            patches: Tensor = seen.last_hidden_state[:, 1:]
            return patches.mT @ patches

    def __call__(self, x0: Tensor, target: Target) -> Tensor:
        wanted = needed(target, self, "Gram matrices, from encode_images(pixels)", x0)
        found = self._gram(x0)
        return safe_norm(found - wanted.to(found)) / self.divisor

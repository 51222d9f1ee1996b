"""A pipeline's text encoders, speaking the denoising network's argument names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.errors import FewstepError
from fewstep.networks.families.family import Conditions
from fewstep.networks.folders import TEXT_MODELS, family_of
from fewstep.networks.host_weights import HOST, HostWeights
from fewstep.networks.parts import load_text_pipeline


class TextEncoding:
    """Encodes prompts as a pipeline does.

    Args:
        folder: the pipeline's.
        device: where to compute.
        dtype: in which precision to compute.
        kept: whether the host keeps the weights while another device computes: they take its memory
            throughout, and then :meth:`offload` copies nothing.

    Raises:
        FewstepError: if the family has no text, or its encoders are missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        kept: bool = False,
    ) -> None:
        self.family = family_of(folder)
        if self.family.encode is None:
            raise FewstepError(f"A {self.family.pipeline} has no text encoder.")
        self._encode = self.family.encode
        self.device = torch.device(device)
        self.pipeline = load_text_pipeline(folder, dtype)
        self._kept = kept
        self._host: HostWeights | None = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditions:
        """Conditionings of prompts under the backbone's argument names, each ``(B, ...)``.

        Args:
            size: height and width of the images in pixels, for families that are told; they are
                told nothing by default, and take their own size.
        """
        self._to(self.device)
        found = self._encode(self.pipeline, list(prompts), False)[0]
        if size is not None and self.family.sized is not None:
            for name, value in self.family.sized(size).items():
                found[name] = value.to(self.device).expand(len(prompts), *value.shape[1:])
        return found

    @torch.no_grad()
    def null(self, negative_prompt: str | None = None) -> Conditions:
        """What the unconditional branch gets, each ``(1, ...)``.

        By default what the pipeline gives it, mostly the embedding of the empty prompt; zeros where
        the pipeline is made so.
        """
        if negative_prompt is not None:
            return self.encode([negative_prompt])
        self._to(self.device)
        return self._encode(self.pipeline, [""], True)[1]

    def to(self, device: str | torch.device) -> TextEncoding:
        """Computes on another device from now on."""
        self.device = torch.device(device)
        return self

    def offload(self) -> None:
        """Puts the encoders on the CPU until they are needed again."""
        self._to(HOST)

    def _to(self, device: torch.device) -> None:
        if self._kept:
            if self._host is None and device != HOST:
                self._host = HostWeights(self._encoders())
            if self._host is not None:
                self._host.to(device)
            return
        for module in self._encoders():
            module.to(device)

    def _encoders(self) -> list[torch.nn.Module]:
        parts = [getattr(self.pipeline, part, None) for part in TEXT_MODELS]
        return [part for part in parts if isinstance(part, torch.nn.Module)]

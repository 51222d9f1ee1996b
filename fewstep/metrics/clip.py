"""CLIP: how well samples show what their prompts say, and features of what they show.

Hessel et al., "CLIPScore" (EMNLP 2021); CLIPSIM of videos after Wu et al., "GODIVA" (2021).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import full_float32
from fewstep.metrics.base import Better, Features, Metric, Reference, Samples, Statistics
from fewstep.metrics.frames import Preparation, check_model, colours, each_frame
from fewstep.metrics.frechet import FrechetDistance
from fewstep.metrics.means import Means
from fewstep.metrics.weights import load_model, model_folder, model_sha256

logger = logging.getLogger(__name__)


class CLIPFeatures(Features):
    """Projected, unnormalised features of CLIP's image and text encoders.

    Gives ``features`` ``(B, D)`` of images or ``(B, F, D)`` of videos' frames, also called
    ``image``, and where samples have prompts ``text`` ``(B, D)``. Longer prompts than the model
    takes are cut, as CLIP's own code does on demand: their last token stays the end.

    Args:
        model: a transformers folder, or a name that is in the Hugging Face cache.
        batch_size: pictures at once; results do not depend on it.
    """

    name = "clip"

    def __init__(self, model: str = "openai/clip-vit-large-patch14", batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self.truncated_prompts = 0
        self.network: Any = None

    def prepare(self) -> None:
        check_model(self.model)

    def load(self, device: torch.device) -> None:
        """Loads the encoders and the tokenizer.

        Raises:
            FewstepError: if the model's folder is missing or damaged.
        """
        folder = model_folder(self.model)
        from transformers import CLIPModel, CLIPTokenizer  # noqa: PLC0415 - slow, and an extra

        network = load_model(CLIPModel, folder)
        self.network = network.requires_grad_(False).eval().to(device)
        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # many types of the tokenizers' library
            raise FewstepError(
                f"The model folder '{folder}' has no readable tokenizer ({error}). Get the whole "
                "folder again."
            ) from error
        self.length = int(network.config.text_config.max_position_embeddings)
        self.preparation = Preparation.read(folder)
        self.sha256 = model_sha256(folder)[:16]

    def identity(self) -> Hashable:
        return (type(self), self.model)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        assert self.network is not None, "load() comes first"
        with full_float32(samples.pixels.device):
            image = each_frame(colours(samples.pixels), self.image_features, self.batch_size)
            found = {"features": image, "image": image}
            if samples.prompts is not None:
                found["text"] = self.text_features(samples.prompts).to(image.device)
        return found

    def image_features(self, pixels: Tensor) -> Tensor:
        """``(N, D)`` of 8-bit images ``(N, 3, H, W)``."""
        seen = self.network.vision_model(pixel_values=self.preparation(pixels))
        return self.network.visual_projection(seen.pooler_output)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """``(B, D)`` of prompts."""
        texts = list(prompts)
        self._count_long(texts)
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.network.device)
        read = self.network.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return self.network.text_projection(read.pooler_output)

    def _count_long(self, texts: list[str]) -> None:
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        found = sum(len(tokens) > self.length for tokens in ids)
        if found and not self.truncated_prompts:
            logger.warning(
                "Prompts are longer than the %d tokens that CLIP reads; it sees their beginnings "
                "(%d of this batch's %d; said once).",
                self.length,
                found,
                len(texts),
            )
        self.truncated_prompts += found

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": Path(self.model).name,
            "weights_sha256": self.sha256,
            "pixels": "8-bit",
            "preparation": self.preparation.protocol(),
            "normalised_features": False,
            "prompt_tokens": self.length,
        }


class CLIPScore(Metric):
    """100 times the mean cosine of samples and their prompts, nothing below zero.

    ``clip_score`` of images; ``clipsim`` of videos, where a video's cosine is the mean of its
    frames'.

    Args:
        features: CLIP; ViT-L/14 by default.
    """

    reference: ClassVar[Reference] = "none"
    needs_prompts = True

    def __init__(self, features: CLIPFeatures | None = None) -> None:
        self.features: Features = features or CLIPFeatures()
        self.better: dict[str, Better] = {"clip_score": "higher", "clipsim": "higher"}

    def statistics(self) -> Means:
        return Means(["cosine", "videos"], _cosines)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        means = generated.means()
        name = "clipsim" if means["videos"] else "clip_score"
        return {name: max(100 * means["cosine"], 0.0)}

    def protocol(self) -> dict[str, Any]:
        return {"metric": "clip_score", "features": self.features.protocol()}


def _cosines(features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
    """Each sample's cosine with its prompt, and whether it is a video."""
    image, text = features["image"], features.get("text")
    if text is None:
        raise FewstepError(
            "A CLIP score compares samples with their prompts, and these samples have none. "
            "Measure on data with prompts, or leave CLIPScore out."
        )
    if image.ndim == 2:
        cosines = F.cosine_similarity(image, text, dim=-1)
        return [cosines, torch.zeros_like(cosines)]
    cosines = F.cosine_similarity(image, text[:, None], dim=-1).mean(1)
    return [cosines, torch.ones_like(cosines)]


class CLIPFrechetDistance(FrechetDistance):
    """Frechet distance over CLIP's image features, ``fd_clip``; of videos over all frames.

    Published "CLIP-FID" figures stand on one CLIP or another (clean-fid's on ViT-B/32): compare
    only those of one model, which the protocol names.

    Args:
        features: CLIP; ViT-L/14 by default.
    """

    def __init__(self, features: CLIPFeatures | None = None) -> None:
        super().__init__(features or CLIPFeatures(), name="fd_clip", output="image")


class FrameConsistency(Metric):
    """Mean cosine of the features of successive frames, ``frame_consistency_`` and their name.

    Over CLIP it is the "CLIP consistency" of the tables on video. A still picture has 1: read it
    together with the amount of motion.

    Args:
        features: of images; CLIP by default.
        output: which of the network's outputs.
    """

    reference: ClassVar[Reference] = "none"

    def __init__(self, features: Features | None = None, output: str = "features") -> None:
        self.features: Features = features or CLIPFeatures()
        self.output = output
        self.name = f"frame_consistency_{self.features.name}"
        self.better: dict[str, Better] = {self.name: "higher"}

    def statistics(self) -> Means:
        return Means([self.name], self._cosines)

    def _cosines(self, features: Mapping[str, Tensor], samples: Samples) -> list[Tensor]:
        frames = features[self.output]
        if samples.pixels.ndim != 5 or frames.ndim != 3 or frames.shape[1] < 2:
            raise FewstepError(
                f"{self.name} compares each frame with the next: it takes videos of at least two "
                "frames, and features of single frames."
            )
        return [F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1).mean(1)]

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Means)
        return generated.means()

    def protocol(self) -> dict[str, Any]:
        return {"metric": self.name, "output": self.output, "features": self.features.protocol()}

"""What the heads of a frame discriminator are told of a frame: its class or caption, as a vector.

No modules of a method: they are neither trained, averaged, sharded nor saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.frames.models import find_model, load_frozen, read_config

Cond = Mapping[str, Tensor]


class FrameCondition(ABC):
    """Makes one vector a sample of what a batch says of it.

    Attributes:
        name: of what it reads among a batch's conditions; None where it reads captions.
    """

    name: str | None = None

    @property
    @abstractmethod
    def dim(self) -> int:
        """Numbers in a vector; known before any batch."""

    @abstractmethod
    def __call__(self, cond: Cond, prompts: list[str] | None, device: torch.device) -> Tensor:
        """``(B, dim)``, float32, without gradient.

        Args:
            cond: a batch's conditions, each ``(B, ...)``.
            prompts: its captions, if there are any.
            device: where the result is wanted.

        Raises:
            FewstepError: if the batch does not have what is needed.
        """


def _given(cond: Cond, name: str | None) -> Tensor:
    assert name is not None
    if name not in cond:
        raise FewstepError(
            f"The frame discriminator's condition looks for '{name}' and the batch has "
            f"{', '.join(cond) or 'no conditions'}; set its `name`, or condition: null."
        )
    return cond[name]


class ClassCondition(FrameCondition):
    """The class as a vector with a single 1; all zeros for a label outside, such as a null class.

    Args:
        name: of the class labels among the conditions.
        num_classes: how many classes there are.
    """

    def __init__(self, name: str = "class_labels", num_classes: int = 10) -> None:
        self.name = name
        self.num_classes = num_classes

    @property
    def dim(self) -> int:
        return self.num_classes

    def __call__(self, cond: Cond, prompts: list[str] | None, device: torch.device) -> Tensor:
        labels = _given(cond, self.name).to(device)
        return (labels[:, None] == torch.arange(self.num_classes, device=device)).float()


class PooledText(FrameCondition):
    """The mean over tokens of the text embedding that the denoiser has already.

    No further encoder is needed, and encoded data need no captions.

    Args:
        dim: channels of the embedding (Stable Diffusion 1.5 and AnimateDiff: 768, ModelScope:
            1024).
        name: of the embedding among the conditions, ``(B, L, dim)`` or ``(B, dim)``.
        mask: of the conditions, says which tokens there are ``(B, L)``, where the data have it.
    """

    def __init__(
        self,
        dim: int,
        name: str = "encoder_hidden_states",
        mask: str | None = "encoder_attention_mask",
    ) -> None:
        self._dim = dim
        self.name = name
        self.mask = mask

    @property
    def dim(self) -> int:
        return self._dim

    @torch.no_grad()
    def __call__(self, cond: Cond, prompts: list[str] | None, device: torch.device) -> Tensor:
        text = _given(cond, self.name).to(device).float()
        if text.shape[-1] != self.dim:
            raise FewstepError(
                f"'{self.name}' has {text.shape[-1]} channels; set the condition's dim: "
                f"{text.shape[-1]}, not {self.dim}."
            )
        if text.ndim == 2:
            return text
        if self.mask is None or self.mask not in cond:
            return text.mean(1)
        kept = cond[self.mask].to(device)[:, :, None].float()
        return (text * kept).sum(1) / kept.sum(1).clamp_min(1)


class TextCondition(FrameCondition):
    """The caption's embedding by a CLIP of its own, projected and not normalised.

    MCM conditions its heads on that of OpenCLIP's ViT-g/14 (laion2B-s34B-b88K), of 1024 numbers.
    Captions longer than the model reads are cut.

    Args:
        source: a folder of a CLIP in the format of transformers (all of it, or the text model with
            projection), or its name in the Hugging Face cache; nothing is downloaded.
        tokenizer: folder of the tokenizer; by default the model's. A pipeline has it apart:
            ``PIPELINE/text_encoder_2`` and ``PIPELINE/tokenizer_2``.
    """

    def __init__(self, source: str, tokenizer: str | None = None) -> None:
        self.source = source
        self.tokenizer = tokenizer

    @cached_property
    def _config(self) -> Any:
        folder = find_model(self.source, "source")
        written = read_config(folder, ("clip", "clip_text_model"))
        from transformers import CLIPTextConfig  # noqa: PLC0415 - slow, and an extra

        if "text_config" not in written:
            return CLIPTextConfig(**written)
        # In a whole CLIP the outer number is the one that counts.
        outer = {k: v for k, v in written.items() if k == "projection_dim"}
        return CLIPTextConfig(**{**written["text_config"], **outer})

    @property
    def dim(self) -> int:
        return int(self._config.projection_dim)

    @cached_property
    def _network(self) -> Any:
        folder = find_model(self.source, "source")
        from transformers import CLIPTextModelWithProjection  # noqa: PLC0415

        return load_frozen(CLIPTextModelWithProjection, folder, config=self._config)

    @cached_property
    def _tokenizer(self) -> Any:
        folder = find_model(self.tokenizer or self.source, "tokenizer")
        from transformers import CLIPTokenizer  # noqa: PLC0415

        try:
            found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # many types of the tokenizers' library
            raise FewstepError(
                f"'{folder}' has no readable tokenizer ({error}); set tokenizer: FOLDER."
            ) from error
        # Of a folder without one, the library makes a tokenizer that knows no words.
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise FewstepError(f"'{folder}' has no tokenizer; set tokenizer: FOLDER.")
        return found

    @torch.no_grad()
    def __call__(self, cond: Cond, prompts: list[str] | None, device: torch.device) -> Tensor:
        if prompts is None:
            raise FewstepError(
                "The frame discriminator is to read captions and the batch has none. Give the data "
                "a `prompt` (images beside videos their own), or use PooledText, which takes the "
                "denoiser's own text embedding."
            )
        tokens = self._tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=int(self._config.max_position_embeddings),
            return_tensors="pt",
        )
        network = self._network.to(device)
        with torch.autocast(device.type, enabled=False):
            # No mask: attention is causal and the caption's end is read, so padding behind it says
            # nothing, while looking at a mask would make the host wait.
            read = network(input_ids=tokens["input_ids"].to(device, non_blocking=True))
        embeddings: Tensor = read.text_embeds
        return embeddings.float()

"""Captions and class labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.fields.base import Decoded, Field, Random


class Caption(Field):
    """A caption, from text or from an entry of a JSON part.

    Where the entry is a list, training draws one of its captions and evaluation takes the first.

    Args:
        entry: of a JSON part; dots lead into nested ones (``text.caption``).
        max_characters: longer captions are refused.
        keys: see :class:`Field`.
    """

    def __init__(
        self,
        entry: str = "caption",
        max_characters: int = 20_000,
        keys: Sequence[str] = ("txt", "json"),
    ) -> None:
        super().__init__(keys)
        self.entry = entry
        self.max_characters = max_characters

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes one caption."""
        text = data.decode()
        if extension.endswith("json"):
            text = self._chosen(text, random)
        if len(text) > self.max_characters:
            raise ValueError(f"{len(text)} characters, more than max_characters")
        return Decoded(text.strip())

    def _chosen(self, text: str, random: Random | None) -> str:
        found: Any = json.loads(text)
        for name in self.entry.split("."):
            if not isinstance(found, dict) or name not in found:
                raise ValueError(f"its JSON has no entry '{self.entry}'")
            found = found[name]
        if isinstance(found, list) and found:
            found = found[0 if random is None else int(random().integers(len(found)))]
        if not isinstance(found, str):
            raise ValueError(f"the entry '{self.entry}' of its JSON is no text")
        return found

    def collate(self, values: list[Any]) -> list[str]:
        """A list of ``B`` captions."""
        return values


class ClassLabel(Field):
    """A class label, an integer as text; ``(B,)`` int64.

    Args:
        num_classes: labels must be smaller; None: any.
        keys: see :class:`Field`.
    """

    def __init__(self, num_classes: int | None = None, keys: Sequence[str] = ("cls",)) -> None:
        super().__init__(keys)
        self.num_classes = num_classes

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes one label."""
        try:
            label = int(data)
        except ValueError as error:
            raise ValueError(f"its class label is no integer: {data[:20]!r}") from error
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            raise ValueError(f"its class label {label} is not below {self.num_classes}")
        return Decoded(label)

    def collate(self, values: list[Any]) -> Tensor:
        """A tensor ``(B,)``."""
        return torch.tensor(values)

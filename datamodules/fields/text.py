"""Captions, class labels and numbers."""

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
        found = _entry_of(text, self.entry)
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


class Numbers(Field):
    """A number, or a list of them, from an entry of a JSON part; ``(B,)`` or ``(B, n)`` float32.

    Args:
        entry: of the JSON part; dots lead into nested ones and, by number, into lists, from the end
            if negative (``centres.0.-1``).
        count: how many numbers there must be in the list; None for a single number.
        keys: see :class:`Field`.
    """

    def __init__(
        self, entry: str, count: int | None = None, keys: Sequence[str] = ("json",)
    ) -> None:
        super().__init__(keys)
        self.entry = entry
        self.count = count

    def decode(self, data: bytes, extension: str, random: Random | None) -> Decoded:
        """Decodes the numbers."""
        found = _entry_of(data.decode(), self.entry)
        numbers = found if isinstance(found, list) else [found]
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"the entry '{self.entry}' of its JSON is not made of numbers")
        if (len(found) if isinstance(found, list) else None) != self.count:
            wanted = "one number" if self.count is None else f"{self.count} numbers"
            raise ValueError(f"the entry '{self.entry}' of its JSON is not {wanted}")
        return Decoded(torch.tensor(found, dtype=torch.float32))


def _entry_of(text: str, entry: str) -> Any:
    """The value at ``entry`` of a JSON text, whose dots lead into objects and lists."""
    found: Any = json.loads(text)
    for name in entry.split("."):
        try:
            found = found[int(name) if isinstance(found, list) else name]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"its JSON has no entry '{entry}'") from None
    return found

"""What data sets that make one stream together have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from datamodules.streaming import Shards
from fewstep.contracts import Batch, Conditions
from fewstep.errors import FewstepError


class Several(pl.LightningDataModule):
    """Data sets of which each keeps its own exact order and position.

    Args:
        sources: the data sets by name; their streams must be endless (``remainder: carry``).
        reference: the source that metrics compare with; the first where null.

    Raises:
        FewstepError: if a stream ends, or the reference is none of them.
    """

    def __init__(self, sources: Mapping[str, Shards], reference: str | None = None) -> None:
        super().__init__()
        ending = [name for name, source in sources.items() if source.remainder != "carry"]
        if ending:
            raise FewstepError(
                f"Set remainder: carry in {ending}: streams that make one together are endless."
            )
        if reference is not None and reference not in sources:
            raise FewstepError(f"data.init_args.reference must be one of {sorted(sources)}.")
        self.sources = dict(sources)
        self.reference = self.sources[reference or next(iter(sources))]

    @property
    def batch_size(self) -> int:
        """Most samples a batch of one device has."""
        return max(source.batch_size for source in self.sources.values())

    # ------------------------------------------------------------------ set up

    def prepare_data(self) -> None:
        """Prepares each source."""
        for source in self.sources.values():
            source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Sets each source up."""
        for source in self.sources.values():
            source.trainer = self.trainer
            source.setup(stage)

    # ------------------------------------------------------------------ position

    def state_dict(self) -> dict[str, Any]:
        """The position of each source."""
        return {"sources": {name: source.state_dict() for name, source in self.sources.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores each source's position."""
        for name, source in self.sources.items():
            source.load_state_dict(state_dict["sources"][name])

    # ------------------------------------------------------------------ reference

    def reference_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """The reference source's records."""
        return self.reference.reference_batches(rank, world_size)

    def reference_conditions(self, numbers: Sequence[int]) -> Conditions:
        """Those of the reference source's records."""
        return self.reference.reference_conditions(numbers)

    def reference_protocol(self) -> dict[str, Any]:
        """Which records those are."""
        return self.reference.reference_protocol()

"""A student read from its checkpoint, and the record of its export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.loading import (
    METADATA_KEY,
    LoadedDenoiser,
    find_checkpoint,
    load_denoiser,
    read_checkpoint,
)
from fewstep.networks.lora import LoRADenoiser
from fewstep.networks.lora_files import merge
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder
from scripts.export.calls import Call, write_calls
from scripts.export.card import Card, write_card
from scripts.export.chains import Chain, chain_of, default_steps
from scripts.export.folder import plain_network
from scripts.export.matching import FrontEnd, Match, find_match
from scripts.runs import run_of_checkpoint

SOLVER_POINTS = 50
"""Of schedulers of networks that were trained on no grid; they do not use it."""


@dataclass(frozen=True)
class Request:
    """What is to be exported, and where to; see the command's help."""

    checkpoint: str | Path
    folder: Path
    pipeline: str | Path | None = None
    base: str | Path | None = None
    role: str = "ema"
    steps: Sequence[int] | None = None
    guidance: float | None = None
    adapter: bool = False
    half: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written."""

    scheduler: str
    calls: list[Call]
    notes: list[str]


@dataclass(frozen=True)
class Student:
    """A student and what its checkpoint says of it.

    Attributes:
        denoiser: with a LoRA merged into its base, unless the adapter alone is asked for.
        loaded: as it was read.
        record: the checkpoint's metadata.
        chains: how it samples, for each step count.
        guidance: scale of classifier-free guidance; 1 is off.
        embedded_guidance: the scale its network is told, if it is told one.
    """

    denoiser: Denoiser
    loaded: LoadedDenoiser
    record: dict[str, Any]
    chains: list[Chain]
    guidance: float
    embedded_guidance: float | None

    def match(self, front: FrontEnd) -> Match:
        """The scheduler that samples as the student does."""
        phases = self.record.get("phases")
        grid = len(phases["times"]) if phases else SOLVER_POINTS
        return find_match(self.denoiser, self.chains, front, grid)


def read_student(request: Request) -> Student:
    """Reads the student that a request names.

    Raises:
        FewstepError: if it cannot be read, or not be exported as asked.
    """
    path = find_checkpoint(request.checkpoint)
    checkpoint = read_remainder(path) if is_sharded_checkpoint(path) else read_checkpoint(path)
    record: dict[str, Any] = checkpoint[METADATA_KEY]
    loaded = load_denoiser(path, request.role, request.base)
    denoiser = _whole(loaded.denoiser, request.adapter)
    plain_network(denoiser)  # refuses what is none before anything is done
    steps = sorted(set(request.steps or default_steps(record)))
    chains = [chain_of(record, denoiser.schedule, k) for k in steps]
    sampling = record.get("sampling", {})
    guidance = sampling.get("guidance_scale", 1.0) if request.guidance is None else request.guidance
    if guidance < 1:
        raise FewstepError(
            f"Pipelines switch guidance off at scales up to 1, so {guidance:g} cannot be exported."
        )
    embedded = sampling.get("embedded_guidance")
    return Student(denoiser, loaded, record, chains, float(guidance), embedded)


def _whole(denoiser: Denoiser, adapter: bool) -> Denoiser:
    """A student as one network, unless the adapter alone is asked for."""
    if not isinstance(denoiser, LoRADenoiser):
        if adapter:
            raise FewstepError("This student is no LoRA; leave --adapter out to export it whole.")
        return denoiser
    if adapter:
        return denoiser
    return Denoiser(
        merge(denoiser), denoiser.schedule, denoiser.prediction_type, denoiser.alpha_floor
    )


def record_export(
    request: Request,
    student: Student,
    folder: Path,
    match: Match,
    calls: list[Call],
    snippets: list[str],
    notes: list[str],
) -> Exported:
    """Writes an exported folder's card and calls.

    Args:
        folder: where to.
        snippets: the lines of each call.
        notes: what a reader must know besides.
    """
    notes = sorted({chain.note for chain in student.chains if chain.note}) + notes
    loaded, scheduler = student.loaded, type(match.scheduler).__name__
    source = {"checkpoint": loaded.source, "sha256": loaded.sha256, "role": loaded.role}
    precision = "float16" if request.half else "float32"
    card = Card(
        request.folder.name, student.record, source, scheduler, calls, snippets, precision, notes
    )
    write_card(folder, card, run_of_checkpoint(Path(loaded.source)))
    said = {
        "method": student.record["method"],
        **source,
        "frozen": student.record.get("frozen", {}),
        "edges": student.record.get("phases", {}).get("edges"),
        "largest_deviation_from_own_sampler": match.deviation,
    }
    write_calls(folder, calls, said)
    return Exported(scheduler, calls, notes)

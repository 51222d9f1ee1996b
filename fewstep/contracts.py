"""The few shapes that modules, datamodules and callbacks agree on; none of them imports another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from fewstep.seeding import Generators


class Batch(TypedDict):
    """What a datamodule yields.

    Attributes:
        sample: pixels in [-1, 1] or latents, ``(B, C, H, W)`` or ``(B, C, F, H, W)``.
        cond: conditioning under the backbone's own argument names, each ``(B, ...)``.
        key: which sample each one is.
        prompt: captions, where text is encoded on the fly.
        source: which part of a mixed data set the batch is from.
        images: pictures that go with the batch's samples, ``r`` a sample: rows ``r i`` to
            ``r i + r - 1`` go with sample ``i``.
        pixels: the samples as the data gave them, where ``sample`` is what they became.
        generated: which samples a method makes itself instead.
        skipped: records that could not be decoded and are missing from this batch, and why.
        notes: what else a datamodule counts about records, such as clips that were too short.
        failed: an error that a loading process met; the datamodule raises it.
    """

    sample: Tensor
    cond: dict[str, Tensor]
    key: list[str]
    prompt: NotRequired[list[str]]
    source: NotRequired[str]
    images: NotRequired[Batch]
    pixels: NotRequired[Tensor]
    generated: NotRequired[list[bool]]
    skipped: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    failed: NotRequired[str]


@runtime_checkable
class FewStepSampler(Protocol):
    """The only thing callbacks know of a method.

    Attributes:
        sample_shape: shape of one sample, without the batch dimension.
    """

    sample_shape: tuple[int, ...]

    def sample(
        self,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators = None,
        role: str | None = None,
        prompt: list[str] | None = None,
    ) -> Tensor:
        """Turns noise into samples in ``num_steps`` network evaluations."""

    def decode(self, x0: Tensor) -> Tensor:
        """Turns samples into pixels in [-1, 1] (or whatever the data set holds)."""

    def sampling_roles(self) -> list[str]:
        """Roles that can sample, the default one first."""

    def guidance_scale(self, role: str | None = None) -> float:
        """The guidance scale a role samples with; 1 is off."""

    def step_counts(self, role: str | None = None) -> list[int]:
        """The numbers of sampling steps to measure a role at, unless told otherwise."""

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, guidance included."""


@runtime_checkable
class SteeredSampler(Protocol):
    """A method that training-free guidance may steer; where it does not, all of this is empty."""

    def is_steered(self) -> bool:
        """Whether it is."""

    def sampling_as(self, plain: bool, counted: bool) -> AbstractContextManager[None]:
        """How samples are made meanwhile: without guidance if ``plain``; in no account of how
        guidance went unless ``counted``, as samples that a rank makes only to keep in step.
        """

    def check_guidance(self) -> None:
        """Raises what went wrong with this rank's samples since it was last asked.

        Asked when all ranks are through: one that left in the middle would leave the others waiting
        within a sharded network.

        Raises:
            FewstepError: if guidance diverged.
        """

    def sampling_cost(self, num_steps: int, role: str | None = None) -> dict[str, float]:
        """What a steered sample took, by name, once some were made."""

    def steering_record(self) -> dict[str, Any]:
        """What it is steered by, in plain values."""

    def guides(self) -> Sequence[nn.Module] | None:
        """The networks that steer; None where nothing does."""

    def write_traces(self) -> None:
        """Writes how guidance went into the run's folder; a collective."""


@runtime_checkable
class FinishedSet(Protocol):
    """Samples that were made elsewhere.

    Attributes:
        num_finished: how many there are.
    """

    num_finished: int

    def finished_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """A rank's share of them; all ranks together give each once."""


class Conditions(NamedTuple):
    """What samples are asked to show.

    Attributes:
        cond: under the backbone's own argument names, each ``(B, ...)``.
        prompt: captions, where the data has them.
    """

    cond: dict[str, Tensor]
    prompt: list[str] | None = None


@runtime_checkable
class ReferenceData(Protocol):
    """What callbacks ask of a datamodule: the data that metrics compare with."""

    def reference_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """A rank's share of the reference records; all ranks together read each once."""

    def reference_conditions(self, numbers: Sequence[int]) -> Conditions:
        """Conditions for the samples of these numbers, 0 and up, taken from reference records.

        A sample's condition depends on its number alone, and any first so many samples have
        conditions from all over the reference.
        """

    def reference_protocol(self) -> dict[str, Any]:
        """Which data that is, in plain values, for the record of a result."""


class Alarm(NamedTuple):
    """A logged value that tells of trouble when it leaves its range.

    Attributes:
        value: its name as logged, such as ``train/motion_variance``.
        below, above: the range's ends; None is no end.
        advice: what is then likely wrong and what to do, in sentences.
    """

    value: str
    below: float | None = None
    above: float | None = None
    advice: str = ""


@runtime_checkable
class Watched(Protocol):
    """A method that knows by which of its logged values its training goes wrong."""

    def alarms(self) -> Sequence[Alarm]:
        """What to watch; the same on all ranks, and fixed once training starts."""

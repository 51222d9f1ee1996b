"""Samples that are steered without training, by gradients of a loss of clean samples."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fewstep.diffusion import Guided
from fewstep.errors import FewstepError, nearest
from fewstep.guidance import BaseStep, Costs, Guidance, guided_sample
from fewstep.guidance.energies import Decoded
from fewstep.guidance.freezing import modules_within
from fewstep.guidance.noise import NoiseOptimisation, optimise_noise
from fewstep.guidance.students import plain_sample
from fewstep.guidance.trace import LARGEST_MOVE, Clock, Trace
from fewstep.networks.latents import LatentCodec
from fewstep.seeding import Generators
from lightning_modules.chains import Chain

TABLE = "guidance.csv"
COLUMNS = ("samples", "loss", "gradient_norm", "displacement", "alignment", "nonfinite")

Key = tuple[str, int]  # role and number of steps


@dataclass(frozen=True)
class Steering:
    """How samples are steered without training, whatever the method that samples.

    Args:
        guidance: what is minimised, how and when; null samples without, for comparison. A
            ``fewstep.guidance.noise.NoiseOptimisation`` looks for better initial noise instead.
        target: which of a sample's conditions the energy is told: its name, such as
            ``class_labels``, or ``prompt`` for energies that read captions; null for energies that
            need none.
        pictures: whether the target is pictures as samples should be, ``(B, C, H, W)``, of which
            the energy makes what it compares: maps, embeddings, measurements. The network is not
            given them.
        unconditional: the network is given the null condition, so that guidance alone brings what
            is wanted; and it is sampled without classifier-free guidance.
        sees: whether the energy sees the ``pixels`` that a pipeline's VAE makes of latents, or the
            ``latents``; without a VAE samples are what they are.
        base: how a step is taken without guidance; by default as the method itself samples.
        checkpointing: computes the network, and the VAE, again in the backward pass instead of
            keeping their activations.
        largest_move: in standard deviations of the noise; a sample that is moved further at once
            ends the run, as guidance has diverged. Null never does.
    """

    guidance: Guidance | NoiseOptimisation | None = None
    target: str | None = "class_labels"
    pictures: bool = False
    unconditional: bool = True
    sees: Literal["pixels", "latents"] = "pixels"
    base: BaseStep | None = None
    checkpointing: bool = False
    largest_move: float | None = LARGEST_MOVE

    def __post_init__(self) -> None:
        if self.pictures and (self.target in (None, "prompt") or self.sees == "latents"):
            raise FewstepError(
                "steering.pictures says that the target is pictures: it needs a target that names "
                "them, and an energy that sees pixels (sees: pixels)."
            )

    def networks(self) -> list[nn.Module]:
        """The networks that the energy looks through."""
        if self.guidance is None:
            return []
        return list(modules_within(self.guidance.energy.staged()[1]))

    def guides(self) -> list[nn.Module] | None:
        """The same; None where there is no guidance at all."""
        return None if self.guidance is None else self.networks()

    def target_of(self, cond: dict[str, Tensor], prompt: list[str] | None) -> Tensor | None:
        """What the energy is told of each sample, ``(B, ...)``.

        Raises:
            FewstepError: if the data have no such condition, or the energy reads no captions.
        """
        if self.target is None or self.guidance is None:
            return None
        if self.target == "prompt":
            return self._read(prompt)
        if self.target not in cond:
            known = [*cond, *(["prompt"] if prompt is not None else [])]
            raise FewstepError(
                f"steering.target is '{self.target}', which the data's conditions do not have."
                f"{nearest(self.target, known)} They have: {', '.join(known) or 'none'}. Take data "
                "with labels, or set target: null for an energy that needs none."
            )
        return self._seen(cond[self.target]) if self.pictures else cond[self.target]

    def for_network(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sample's conditions without what only the energy is told."""
        return {name: cond[name] for name in cond if not (self.pictures and name == self.target)}

    def of_latents(self, codec: LatentCodec | None) -> Guidance | NoiseOptimisation | None:
        """The guidance for samples that are latents of a codec, or for pixels without one."""
        if self.guidance is None or codec is None or self.sees == "latents":
            return self.guidance
        energy = Decoded(self.guidance.energy, codec, None, self.checkpointing, at_once=1)
        return replace(self.guidance, energy=energy)

    def _seen(self, pictures: Tensor) -> Tensor:
        """What the energy compares of pictures ``(B, C, H, W)``."""
        assert self.guidance is not None
        energy = self.guidance.energy.staged()[1]
        encode = getattr(energy, "encode_images", None)
        if encode is None or pictures.ndim != 4:
            raise FewstepError(
                f"steering.pictures is true, but {type(energy).__name__} compares nothing of "
                f"'{self.target}', of shape {tuple(pictures.shape)}. Leave it out, or take an "
                "energy of pictures, such as MapDistance, and a target of fields.Images."
            )
        for network in self.networks():
            network.to(pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            found: Tensor = encode(pictures.float())
        return found

    def _read(self, prompt: list[str] | None) -> Tensor:
        """Captions as the energy knows them, ``(B, ...)``."""
        assert self.guidance is not None
        energy = self.guidance.energy.staged()[1]
        encode = getattr(energy, "encode", None)
        if encode is None:
            raise FewstepError(
                f"steering.target is prompt, but {type(energy).__name__} reads no captions. Name "
                "the condition that it takes, or set target: null if it needs none."
            )
        if prompt is None:
            raise FewstepError(
                "steering.target is prompt, but the data have no captions: add `prompt: "
                "{class_path: datamodules.fields.Caption}` to their conditions."
            )
        found: Tensor = encode(prompt)
        return found


class Steered:
    """Samples as a steering says, and keeps account of it.

    Attributes:
        costs: of a sample, by role and number of steps.
        traces: times of the rounds, and sums over samples, by role and number of steps.
        counted: whether samples that are made now are in them.
        failure: the first error that guidance met and that nobody was told of yet.
    """

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self.costs: dict[Key, dict[str, float]] = {}
        self.traces: dict[Key, tuple[tuple[float, ...], Tensor]] = {}
        self.counted = True
        self.failure: FewstepError | None = None
        self._clock: dict[Key, tuple[float, int]] = {}

    def sample(
        self,
        denoiser: Guided,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        target: Tensor | None,
        chain: Chain,
        generator: Generators,
        key: Key,
        codec: LatentCodec | None = None,
    ) -> Tensor:
        """Samples ``(B, ...)`` along a chain; what goes wrong with guidance is kept as ``failure``.

        Args:
            denoiser: the network, with its scale of classifier-free guidance.
            noise: ``(B, ...)``.
            cond: the network's condition.
            target: see :meth:`Steering.target_of`.
            chain: the method's own.
            generator: draws what the chain and the guidance draw.
            key: what costs and traces go by.
            codec: of samples that are latents.
        """
        steering, guidance = self.steering, self.steering.of_latents(codec)
        if guidance is None and steering.base is None:
            clock = Clock(noise.device)
            samples = chain.sample(denoiser, noise, cond, generator)
            clock.lap()
            costs = Costs(chain.num_steps, 0, 0, clock.seconds())
            self._note_costs(key, costs, denoiser, len(noise))
            return samples
        base = steering.base or chain.base(denoiser.schedule)
        if guidance is None:
            made = plain_sample(denoiser, noise, cond, chain.times, generator, base)
        else:
            for network in steering.networks():  # which need not be part of any module
                network.to(noise.device)
            run: Any = guided_sample if isinstance(guidance, Guidance) else optimise_noise
            made = run(
                denoiser,
                noise,
                cond,
                chain.times,
                guidance,
                None if target is None else target.to(noise.device),
                generator,
                base,
                checkpointing=steering.checkpointing,
                largest_move=None,
            )
            self._check(made.trace)
            self._note_trace(key, made.trace)
        self._note_costs(key, made.trace.costs, denoiser, len(noise))
        found: Tensor = made.samples
        return found

    def _check(self, trace: Trace) -> None:
        try:
            if self.steering.largest_move is not None:
                trace.check(self.steering.largest_move)
        except FewstepError as error:
            self.failure = self.failure or error

    def _note_costs(self, key: Key, costs: Costs, denoiser: Guided, count: int) -> None:
        if not self.counted:
            return
        passes = 1 if denoiser.guidance_scale == 1 else 2
        seconds, samples = self._clock.get(key, (0.0, 0))
        self._clock[key] = (seconds + costs.seconds, samples + count)
        self.costs[key] = {
            "denoiser_evaluations": costs.denoiser_evaluations * passes,
            "denoiser_gradients": costs.denoiser_gradients * passes,
            "energy_evaluations": costs.energy_evaluations,
            "seconds": (seconds + costs.seconds) / (samples + count),
        }

    def _note_trace(self, key: Key, trace: Trace) -> None:
        ones = torch.ones_like(trace.loss)
        rows = (ones, trace.loss, trace.gradient_norm, trace.displacement, trace.alignment)
        sums = torch.stack([row.cpu().double().sum(1) for row in (*rows, trace.nonfinite)], dim=1)
        if not self.counted:  # all ranks have the same tables, for their sum
            sums = torch.zeros_like(sums)
        before = self.traces.get(key)
        self.traces[key] = (trace.times, sums if before is None else before[1] + sums)

    def table(self, trainer: pl.Trainer, device: torch.device) -> list[dict[str, Any]]:
        """Means over all ranks' samples, one row a round; a collective that forgets the sums."""
        rows: list[dict[str, Any]] = []
        for (role, steps), (times, own) in sorted(self.traces.items()):
            sums = own.to(device)
            if trainer.world_size > 1:
                sums = cast(Tensor, trainer.strategy.reduce(sums, reduce_op="sum"))
            for number, (t, values) in enumerate(zip(times, sums.tolist(), strict=True)):
                count, *means = values
                found = [int(count), *(mean / count for mean in means[:-1]), int(means[-1])]
                about = {"role": role, "num_steps": steps, "round": number, "t": t}
                rows.append(about | dict(zip(COLUMNS, found, strict=True)))
        self.traces.clear()
        return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rounds of guided runs as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

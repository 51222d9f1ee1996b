"""Samples as a steering says, and the account that is kept of them."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from fewstep.diffusion import Cond, Guided
from fewstep.errors import FewstepError
from fewstep.guidance import BestOf, Costs, Guidance, GuidedSamples, guided_sample
from fewstep.guidance.energies import Target
from fewstep.guidance.noise import NoiseOptimisation, optimise_noise
from fewstep.guidance.selection import CandidateSampler, Selected
from fewstep.guidance.students import plain_sample
from fewstep.guidance.trace import Clock, Recorder, Trace
from fewstep.networks.latents import LatentCodec
from fewstep.seeding import Generators
from lightning_modules.chains import Chain
from lightning_modules.steering import Steering

TABLE = "guidance.csv"
COLUMNS = ("samples", "loss", "gradient_norm", "displacement", "alignment", "nonfinite")

Key = tuple[str, int]  # role and number of steps


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
        steering = self.steering
        for network in steering.networks():  # which need not be part of any module
            network.to(noise.device)
        if steering.detach_null:
            denoiser = Guided(denoiser.denoiser, denoiser.guidance_scale, True, denoiser.channels)
        guidance, best = steering.of_latents(codec), steering.best_of(codec)
        aims = None if target is None else target.to(noise.device)
        draw = partial(self._drawn, denoiser, chain, guidance)
        if best is None:
            made = draw(noise, cond, aims, generator)
        else:
            made = best_of_each(best, draw, noise, cond, aims, generator)
        self._check(made)
        if guidance is not None:
            self._note_trace(key, made.trace)
        self._note_costs(key, made.trace.costs, denoiser, len(noise))
        return made.samples

    def _drawn(
        self,
        denoiser: Guided,
        chain: Chain,
        guidance: Guidance | NoiseOptimisation | None,
        noise: Tensor,
        cond: Cond | None,
        target: Target,
        generator: Generators,
    ) -> GuidedSamples:
        """Samples from noise ``(B, ...)``, one of each."""
        steering = self.steering
        if guidance is None and steering.base is None:
            recorder = Recorder(denoiser_evaluations=chain.num_steps, clock=Clock(noise.device))
            samples = chain.sample(denoiser, noise, cond, generator)
            return GuidedSamples(samples, recorder.close(samples, None))
        base = steering.base or chain.base(denoiser.schedule)
        if guidance is None:
            return plain_sample(denoiser, noise, cond, chain.times, generator, base)
        run: Any = guided_sample if isinstance(guidance, Guidance) else optimise_noise
        found: GuidedSamples = run(
            denoiser,
            noise,
            cond,
            chain.times,
            guidance,
            target,
            generator,
            base,
            checkpointing=steering.checkpointing,
            largest_move=None,
        )
        return found

    def _check(self, made: GuidedSamples) -> None:
        try:
            if isinstance(made, Selected):
                made.check()
            largest = self.steering.largest_move
            made.trace.check(math.inf if largest is None else largest)
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


def best_of_each(
    best: BestOf,
    draw: CandidateSampler,
    noise: Tensor,
    cond: Cond | None,
    target: Target,
    generator: Generators,
) -> Selected:
    """The best of several candidates for each sample.

    The first starts from the given noise and generators. What the others draw follows from the
    sample's own noise ``(B, ...)``, so that a sample depends on no batch mate.
    """
    numbers = [numbered(row) for row in noise.cpu()]
    own = generator if isinstance(generator, Sequence) else None
    return best(draw, noise, numbers, cond, target, first=(noise, own), check=False)


def numbered(noise: Tensor) -> int:
    """A number that follows from noise on the CPU."""
    digest = hashlib.blake2b(noise.contiguous().float().numpy().tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rounds of guided runs as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

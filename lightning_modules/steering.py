"""Samples that are steered without training, by gradients of a loss of clean samples."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError, nearest
from fewstep.guidance import BaseStep, BestOf, Energy, Guidance
from fewstep.guidance.energies import Decoded
from fewstep.guidance.freezing import modules_within
from fewstep.guidance.noise import NoiseOptimisation
from fewstep.guidance.trace import LARGEST_MOVE
from fewstep.networks.latents import LatentCodec


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
        frames: of latent videos, which ones to decode for the energy, counted in pixels; all by
            default. Each is decoded at every gradient, which takes time and memory.
        detach_null: with a condition and ``sampling_guidance``, no gradient through the
            unconditional branch: less memory, and another direction.
        base: how a step is taken without guidance; by default as the method itself samples.
        checkpointing: computes the network, and the VAE, again in the backward pass instead of
            keeping their activations.
        largest_move: in standard deviations of the noise; a sample that is moved further at once
            ends the run, as guidance has diverged. With null no length does, but losses and
            samples that are not finite still end it.
        candidates: of each sample, of which the one with the lowest energy is kept (best of N).
            The first is the sample that there would be without; the others start from noise of
            their own. The energy is that of the guidance, in its random views if it has any.
        ranking: without guidance, the energy that candidates are ranked by; it is told the target.
    """

    guidance: Guidance | NoiseOptimisation | None = None
    target: str | None = "class_labels"
    pictures: bool = False
    unconditional: bool = True
    sees: Literal["pixels", "latents"] = "pixels"
    frames: list[int] | None = None
    detach_null: bool = False
    base: BaseStep | None = None
    checkpointing: bool = False
    largest_move: float | None = LARGEST_MOVE
    candidates: int = 1
    ranking: Energy | None = None

    def __post_init__(self) -> None:
        self._check_candidates()
        if self.detach_null and self.unconditional:
            raise FewstepError(
                "steering.detach_null is for classifier-free guidance, and with unconditional: "
                "true there is none. Set unconditional: false, or leave it out."
            )
        if self.pictures and (self.target in (None, "prompt") or self.sees == "latents"):
            raise FewstepError(
                "steering.pictures says that the target is pictures: it needs a target that names "
                "them, and an energy that sees pixels (sees: pixels)."
            )

    def _check_candidates(self) -> None:
        if self.candidates < 1:
            raise FewstepError(
                "steering.candidates is how many samples are drawn for each that is kept, 1 or "
                f"more, not {self.candidates}."
            )
        if self.ranking is not None and self.guidance is not None:
            raise FewstepError(
                "steering.ranking ranks candidates where there is no guidance; here the guidance's "
                "own energy does. Leave out ranking, or set guidance: null."
            )
        if self.ranking is not None and self.candidates == 1:
            raise FewstepError(
                "steering.ranking chooses among candidates, and there is one. Set candidates: 2 or "
                "more, or leave out ranking."
            )
        if self.candidates > 1 and self.energy is None:
            raise FewstepError(
                f"steering.candidates is {self.candidates}, and without guidance nothing says "
                "which is best: set steering.ranking to an energy, such as "
                "fewstep.guidance.ClassLabel."
            )

    @property
    def energy(self) -> Energy | None:
        """What steers: the guidance's energy, or that which ranks candidates."""
        return self.ranking if self.guidance is None else self.guidance.energy

    def networks(self) -> list[nn.Module]:
        """The networks that the energy looks through."""
        return [] if self.energy is None else list(modules_within(self.energy.staged()[1]))

    def guides(self) -> list[nn.Module] | None:
        """The same; None where nothing steers at all."""
        return None if self.energy is None else self.networks()

    def target_of(self, cond: dict[str, Tensor], prompt: list[str] | None) -> Tensor | None:
        """What the energy is told of each sample, ``(B, ...)``.

        Raises:
            FewstepError: if the data have no such condition, or the energy reads no captions.
        """
        if self.target is None or self.energy is None:
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

    def for_network(self, cond: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """A sample's conditions without what only the energy is told.

        That is a target of pictures, and one that the network's ``forward`` does not know.
        """
        known = inspect.signature(network.forward).parameters
        apart = self.pictures or (self.target is not None and self.target not in known)
        return {name: cond[name] for name in cond if not (apart and name == self.target)}

    def of_latents(self, codec: LatentCodec | None) -> Guidance | NoiseOptimisation | None:
        """The guidance for samples that are latents of a codec, or for pixels without one."""
        if self.guidance is None:
            return None
        return replace(self.guidance, energy=self._decoded(self.guidance.energy, codec))

    def best_of(self, codec: LatentCodec | None) -> BestOf | None:
        """How candidates are chosen from, likewise; None where there is one alone."""
        if self.candidates == 1 or self.energy is None:
            return None
        views = None if self.guidance is None else self.guidance.augmentor
        return BestOf(self.candidates, self._decoded(self.energy, codec), views)

    def _decoded(self, energy: Energy, codec: LatentCodec | None) -> Energy:
        """An energy of what samples are: pixels, or latents of a codec."""
        if codec is None or self.sees == "latents":
            if self.frames is not None:
                raise FewstepError(
                    "steering.frames names frames to decode, and here nothing is decoded. Leave it "
                    "out."
                )
            return energy
        return Decoded(energy, codec, self.frames, self.checkpointing, at_once=1)

    def _seen(self, pictures: Tensor) -> Tensor:
        """What the energy compares of pictures ``(B, C, H, W)``."""
        assert self.energy is not None
        energy = self.energy.staged()[1]
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
        assert self.energy is not None
        energy = self.energy.staged()[1]
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

"""Counts the network evaluations of a diffusers pipeline while it samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

# The components that denoise, under the names that diffusers gives them.
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
INPUTS = ("sample", "hidden_states", "x")


class Evaluations:
    """How many samples the denoising networks have seen.

    Attributes:
        seen: samples, those of passes for guidance included.
    """

    def __init__(self) -> None:
        self.seen = 0

    def note(self, network: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A forward pre-hook: notes the size of a batch, a tensor or a list of samples."""
        given = [*inputs, *(named[name] for name in INPUTS if name in named)]
        first = next((one for one in given if isinstance(one, Tensor | list)), None)
        if first is not None:
            self.seen += len(first)


@contextmanager
def counted(pipeline: Any) -> Iterator[Evaluations]:
    """Counts while a pipeline samples; zero where it has no denoiser of a usual name."""
    count = Evaluations()
    with ExitStack() as stack:
        for name in DENOISERS:
            network = getattr(pipeline, name, None)
            if isinstance(network, nn.Module):
                hook = network.register_forward_pre_hook(count.note, with_kwargs=True)
                stack.callback(hook.remove)
        yield count


def runs_twice(pipeline: Any, guidance: float) -> bool:
    """Whether guidance takes a second pass, for a pipeline whose passes cannot be counted.

    Args:
        pipeline: one that has sampled with this scale, which some of them remember.
        guidance: scale; at most 1 is off.
    """
    said = getattr(pipeline, "do_classifier_free_guidance", None)
    return guidance > 1 if said is None else bool(said)

"""What schedulers of diffusers can do of a student's own sampling chain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewstep.diffusion.schedules import Schedule
from fewstep.errors import FewstepError
from lightning_modules import chains
from lightning_modules.chains import Record, default_steps

__all__ = ["Chain", "chain_of", "default_steps"]


@dataclass(frozen=True)
class Chain(chains.Chain):
    """A chain that some scheduler does.

    Attributes:
        note: what of the student's own sampling this leaves out, if anything.
    """

    note: str = ""


def chain_of(record: Record, schedule: Schedule, num_steps: int) -> Chain:
    """The chain that a checkpoint's method samples with, as far as it can be exported.

    Args:
        record: the checkpoint's metadata.
        schedule: the student's.

    Raises:
        FewstepError: for a method whose sampling is unknown here, or a step count it cannot serve.
    """
    if record["method"] not in chains.CHAINS:
        raise FewstepError(
            f"Students of {record['method']} cannot be exported: what diffusers must do to sample "
            f"as they do is known for {', '.join(chains.CHAINS)}."
        )
    own = chains.chain_of(record, schedule, num_steps)
    plain = Chain(own.times, own.renoise)
    if record.get("sampling", {}).get("sampler") == "ddpm":
        note = "The run samples by DDPM; what is exported follows the ODE instead."
        return replace(plain, note=note)
    if own.stochasticity == 0:
        return plain
    if own.stochasticity == 1 and schedule.t_min == schedule.t_clean:
        return replace(plain, renoise=True)
    return replace(
        plain,
        note=(
            f"The student was trained to be sampled with stochasticity {own.stochasticity:g}, "
            "which no scheduler of diffusers does: only its deterministic chain is exported."
        ),
    )

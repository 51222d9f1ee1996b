"""A diffusers pipeline that starts from given noise, so that its pictures compare with a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of, read_configs, sample_shape
from scripts.evaluate.pipelines import PipelineSampler
from scripts.export.calls import read_calls


class DrawnPipeline(PipelineSampler):
    """Samples from the noise it is given, and draws fresh noise as this project's samplers do.

    Of the same noise and prompts, an exported pipeline makes what its student makes.

    Args:
        folder, steps, guidance: see :class:`PipelineSampler`.

    Raises:
        FewstepError: as :class:`PipelineSampler` does, or if the pipeline is of no supported
            family, whose latents are known, or takes none.
    """

    def __init__(self, folder: Path, steps: list[int], guidance: float | None = None) -> None:
        super().__init__(folder, steps, guidance)
        family = family_of(folder)
        if "latents" not in self._takes:
            raise FewstepError(
                f"{family.pipeline} draws its noise itself and takes none, so its pictures would "
                "compare with no others. `fewstep evaluate --pipeline` measures it."
            )
        self._laid_out = family.pipeline_latents
        stated = self._calls[steps[0]].arguments if self._calls else {}
        size = (stated["height"], stated["width"]) if "height" in stated else None
        configs = read_configs(folder, family, size)
        self.sample_shape = sample_shape(configs, family, stated.get("num_frames"))
        self._size = configs.size

    def setup(self, stage: str) -> None:
        """Moves the pipeline to this rank's device; the shape of its latents is known."""
        self.move_pipeline()

    def start(self, noise: Tensor) -> dict[str, Any]:
        """The noise, laid out as the pipeline takes it, and the size that goes with it."""
        sized = {"height": self._size[0], "width": self._size[1]}
        given = {name: value for name, value in sized.items() if name in self._takes}
        return {"latents": self._laid_out(noise), **given}


def exported_steps(folder: Path) -> list[int]:
    """The step counts that a folder was exported for; none if ``fewstep export`` wrote it not."""
    return sorted(read_calls(folder))

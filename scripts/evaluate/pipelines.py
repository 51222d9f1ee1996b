"""A diffusers pipeline as a sampler: anybody's model, measured as its own pipeline samples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.seeding import Generators, torch_generator
from scripts.evaluate.standing import StandIn

ROLE = "pipeline"


class PipelineSampler(StandIn):
    """Samples with a pipeline from a local folder, as ``save_pretrained`` wrote it.

    Noise is drawn by the pipeline, from one generator a sample, so that a sample depends on the
    seed and its number alone.

    Args:
        folder: of the pipeline.
        steps: sampling step counts.
        guidance: guidance scale; the pipeline's own default by default.

    Raises:
        FewstepError: if it is no pipeline, or takes none of prompts, class labels and batch sizes.
    """

    def __init__(self, folder: Path, steps: list[int], guidance: float | None = None) -> None:
        if not (folder / "model_index.json").is_file():
            raise FewstepError(
                f"'{folder}' is no diffusers pipeline: it has no model_index.json. Give a folder "
                "that save_pretrained or `fewstep export` wrote."
            )
        try:
            pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise FewstepError(f"The pipeline '{folder}' cannot be loaded: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        self._takes = inspect.signature(pipeline.__call__).parameters
        default = self._takes["guidance_scale"].default if "guidance_scale" in self._takes else 1.0
        super().__init__(ROLE, steps, float(default if guidance is None else guidance))
        # Not a sub-module: a pipeline is moved as a whole.
        self._pipeline: Any = pipeline
        self.provenance = {ROLE: {"source": str(folder)}}
        self.sample_shape: tuple[int, ...] = ()

    def setup(self, stage: str) -> None:
        """Moves the pipeline to this rank's device and finds out what shape its samples have."""
        self._pipeline.to(self.device)
        labels = torch.zeros(1, dtype=torch.long)
        source = [torch_generator(0, "probe")]
        probe = self.sample(labels, {"class_labels": labels}, 1, source, prompt=[""])
        self.sample_shape = tuple(probe.shape[1:])

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        cond: dict[str, Tensor] | None,
        num_steps: int,
        generator: Generators = None,
        role: str | None = None,
        prompt: list[str] | None = None,
    ) -> Tensor:
        """Pixels in [-1, 1], ``(B, C, H, W)`` or ``(B, C, F, H, W)``.

        Args:
            noise: only its number of samples counts.
            cond: of its entries only ``class_labels``.
            num_steps: sampling steps.
            generator: one a sample.
            role: there is only one.
            prompt: captions, for pipelines that take them.

        Raises:
            FewstepError: if the pipeline asks for what the data do not have.
        """
        given: dict[str, Any] = {"num_inference_steps": num_steps, "output_type": "np"}
        if "guidance_scale" in self._takes:
            given["guidance_scale"] = self.guidance
        made = self._pipeline(
            **self._asked(len(noise), cond or {}, prompt),
            **{name: value for name, value in given.items() if name in self._takes},
            generator=generator,
        )
        videos = hasattr(made, "frames")
        pixels = torch.as_tensor(made.frames if videos else made.images).float() * 2 - 1
        return pixels.permute(0, 4, 1, 2, 3) if videos else pixels.permute(0, 3, 1, 2)

    def _asked(
        self, count: int, cond: dict[str, Tensor], prompt: list[str] | None
    ) -> dict[str, Any]:
        """What each sample is asked to show, as the pipeline takes it."""
        if "prompt" in self._takes:
            if prompt is None:
                raise FewstepError(
                    f"{type(self._pipeline).__name__} takes prompts, and the data have none: add "
                    "`prompt: {class_path: datamodules.fields.Caption}` to their conditions."
                )
            return {"prompt": prompt}
        if "class_labels" in self._takes:
            if "class_labels" not in cond:
                raise FewstepError(
                    f"{type(self._pipeline).__name__} takes class labels, and the data have none."
                )
            return {"class_labels": cond["class_labels"].tolist()}
        if "batch_size" in self._takes:
            return {"batch_size": count}
        raise FewstepError(
            f"{type(self._pipeline).__name__} takes none of prompts, class labels and batch sizes, "
            "so it cannot be measured."
        )

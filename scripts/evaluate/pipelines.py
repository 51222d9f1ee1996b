"""A diffusers pipeline as a sampler: anybody's model, measured as its own pipeline samples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from datamodules.contents import name_of_files
from fewstep.errors import FewstepError
from fewstep.networks.folders import part_of
from fewstep.networks.gates import has_gates, load_gates
from fewstep.seeding import Generators, torch_generator
from scripts.evaluate.counting import counted, runs_twice
from scripts.evaluate.standing import StandIn
from scripts.export.calls import Call, drawing_from, read_calls, visiting

ROLE = "pipeline"


class PipelineSampler(StandIn):
    """Samples with a pipeline from a local folder, as ``save_pretrained`` wrote it.

    Noise is drawn by the pipeline, from one generator a sample, so that a sample depends on the
    seed and its number alone.

    Args:
        folder: of the pipeline.
        steps: sampling step counts.
        guidance: guidance scale; the pipeline's own default by default.

    A folder that ``fewstep export`` wrote is called as its card says. Network evaluations are
    counted while it samples.

    Raises:
        FewstepError: if it is no pipeline, takes none of prompts, class labels and batch sizes, or
            was exported for other step counts.
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
        for part in ("unet", "transformer"):
            place = folder / part_of(folder, part)
            if getattr(pipeline, part, None) is not None and has_gates(place):
                load_gates(getattr(pipeline, part), place)
        pipeline.set_progress_bar_config(disable=True)
        self._takes = inspect.signature(pipeline.__call__).parameters
        self._calls = read_calls(folder)
        strange = [k for k in steps if self._calls and k not in self._calls]
        if strange:
            raise FewstepError(
                f"'{folder}' was exported for {list(self._calls)} steps, not for {strange}; "
                f"measure it with --steps {' '.join(map(str, self._calls))}."
            )
        default = self._takes["guidance_scale"].default if "guidance_scale" in self._takes else 1.0
        if self._calls:
            default = self._calls[steps[0]].arguments.get("guidance_scale", default)
        super().__init__(ROLE, steps, float(default if guidance is None else guidance))
        # Not a sub-module: a pipeline is moved as a whole.
        self._pipeline: Any = pipeline
        self._folder = folder
        self._device = torch.device("cpu")
        self._evaluations: dict[int, int] = {}
        self.provenance = {ROLE: {"source": str(folder)}}
        self.sample_shape: tuple[int, ...] = ()

    def setup(self, stage: str) -> None:
        """Moves the pipeline to this rank's device and finds out what shape its samples have."""
        self.move_pipeline()
        labels = torch.zeros(1, dtype=torch.long)
        source = [torch_generator(0, "probe")]
        probe = self.sample(labels, {"class_labels": labels}, min(self.steps), source, prompt=[""])
        self.sample_shape = tuple(probe.shape[1:])

    def move_pipeline(self) -> None:
        """Moves the pipeline to this rank's device; Lightning moves the module itself later."""
        self._device = self.trainer.strategy.root_device
        self._pipeline.to(self._device)

    def start(self, noise: Tensor) -> dict[str, Any]:
        """What the pipeline starts from; by default it draws that itself."""
        return {}

    def sampling_evaluations(self, num_steps: int, role: str | None = None) -> int:
        """Network evaluations a sample, as counted; or, before it was, in proportion to steps."""
        if num_steps in self._evaluations:
            return self._evaluations[num_steps]
        known = min(self._evaluations, default=0)
        passes = self._evaluations[known] / known if known else 1.0
        return round(num_steps * passes)

    def sample_source(self) -> dict[str, Any]:
        """Where the pipeline is, and a name for what its folder holds."""
        files = sorted(path for path in self._folder.rglob("*") if path.is_file())
        return {
            "pipeline": str(self._folder.resolve()),
            "files": len(files),
            "contents": name_of_files(self._folder, files),
        }

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
        """Pixels in [-1, 1], ``(B, C, H, W)`` or ``(B, C, F, H, W)``, on this rank's device.

        Args:
            noise: only its number of samples counts, unless :meth:`start` says otherwise.
            cond: of its entries only ``class_labels``.
            num_steps: sampling steps.
            generator: one a sample.
            role: there is only one.
            prompt: captions, for pipelines that take them.

        Raises:
            FewstepError: if the pipeline asks for what the data do not have.
        """
        stated = self._calls.get(num_steps, Call(num_steps, {}))
        given: dict[str, Any] = {"num_inference_steps": num_steps, "output_type": "np"}
        given |= {**stated.arguments, **self.start(noise)}
        if "guidance_scale" in self._takes:
            given["guidance_scale"] = self.guidance
        scheduler = getattr(self._pipeline, "scheduler", None)
        with (
            visiting(scheduler, stated.visit),
            drawing_from(scheduler, generator),
            counted(self._pipeline) as count,
        ):
            made = self._pipeline(
                **self._asked(len(noise), cond or {}, prompt),
                **{name: value for name, value in given.items() if name in self._takes},
                generator=generator,
            )
        twice = runs_twice(self._pipeline, self.guidance)
        guessed = num_steps * (2 if twice else 1)
        self._evaluations[num_steps] = round(count.seen / len(noise)) or guessed
        videos = hasattr(made, "frames")
        pixels = torch.as_tensor(made.frames if videos else made.images, device=self._device)
        pixels = pixels.float() * 2 - 1
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

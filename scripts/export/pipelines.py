"""Exporting students of diffusers pipelines: whole pipelines, or adapters beside a scheduler."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers

from fewstep.errors import FewstepError
from fewstep.networks.families import Family
from fewstep.networks.families.flux import PIPELINE_GUIDANCE
from fewstep.networks.folders import find_folder, pixel_factors, read_json, weights_hash
from fewstep.networks.lora import LoRADenoiser
from fewstep.networks.lora_files import save_adapter
from fewstep.networks.pipelines import network_parts
from lightning_modules.roles import is_pipeline
from scripts.export.calls import Call
from scripts.export.folder import check_base, write_pipeline
from scripts.export.matching import FrontEnd
from scripts.export.snippets import GATES, pipeline_snippet
from scripts.export.students import Exported, Request, Student, record_export


def export_pipeline(request: Request, student: Student, folder: Path) -> Exported:
    """Writes a pipeline's folder, or an adapter and a scheduler.

    Raises:
        FewstepError: if the base pipeline is missing or another architecture's, or diffusers
            cannot sample as the student does.
    """
    denoiser, base = student.denoiser, base_pipeline(request, student.record)
    family = check_base(base, denoiser)
    match = student.match(FrontEnd.of(family.pipeline))
    takes = set(inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters)
    shared = _guidance(family, student) | _size(base, family, denoiser.sample_shape)
    shared = {name: value for name, value in shared.items() if name in takes}
    calls = []
    for chain in student.chains:
        way = match.steering[chain.num_steps]
        arguments = {"num_inference_steps": chain.num_steps, **shared, **way.arguments}
        calls.append(Call(chain.num_steps, arguments, way.visit, chain.times.tolist()))
    name, adapted, beside = request.folder.name, "", False
    if isinstance(denoiser, LoRADenoiser):
        _check_adapter_fits(base, family, denoiser)
        name, adapted = str(request.pipeline or base), request.folder.name
        save_adapter(denoiser, folder)
        match.scheduler.save_pretrained(folder / "scheduler")
    else:
        _check_scheduler_stays(family, match.scheduler)
        beside = write_pipeline(folder, base, family, denoiser, match.scheduler, request.half)
    videos, scheduler = len(denoiser.sample_shape) == 4, type(match.scheduler).__name__
    gated = family.part if beside else ""
    snippets = [
        pipeline_snippet(name, call, takes, videos, adapted, scheduler, gated) for call in calls
    ]
    notes = [*([GATES] if beside else []), *_notes(student, base, family)]
    return record_export(request, student, folder, match, calls, snippets, notes)


def base_pipeline(request: Request, record: dict[str, Any]) -> Path:
    """The folder of the pipeline whose other parts go along.

    Raises:
        FewstepError: if the checkpoint names none, or it is not here.
    """
    given = request.pipeline or _pipeline_of_base(request)
    if given is not None:
        return find_folder(given)
    origins = [origin.get("pipeline") for origin in record.get("frozen", {}).values()]
    folder = next(filter(None, origins), None)
    if folder is None:
        raise FewstepError(
            "The checkpoint does not say from which pipeline its teacher came; give it for its VAE "
            "and text encoders: --pipeline FOLDER."
        )
    try:
        return find_folder(folder)
    except FewstepError as error:
        raise FewstepError(
            f"The base pipeline '{folder}', which the checkpoint names, is not here; give it: "
            "--pipeline FOLDER."
        ) from error


def _pipeline_of_base(request: Request) -> str | Path | None:
    """The folder that was given as a LoRA's base, if it is a pipeline's."""
    folder = request.base
    return folder if folder is not None and is_pipeline(str(folder)) else None


def _guidance(family: Family, student: Student) -> dict[str, Any]:
    """How a pipeline is told the guidance scale."""
    guidance, embedded = student.guidance, student.embedded_guidance
    if family.pipeline == "FluxPipeline":
        # Its guidance_scale is the network's own input; guidance proper goes by another name.
        given: dict[str, Any] = {"guidance_scale": PIPELINE_GUIDANCE}
        proper = {"true_cfg_scale": guidance, "negative_prompt": ""}
        return given if guidance == 1 else {**given, **proper}
    if student.denoiser.backbone.guidance_input is None:
        return {"guidance_scale": guidance}
    if embedded is None or guidance != 1:
        raise FewstepError(
            "This student's network takes a guidance scale as input, and pipelines then switch "
            "guidance itself off. It can be exported if it was trained with guidance_embedding: "
            "true and samples with sampling_guidance: 1 (or --guidance 1)."
        )
    if "timestep_cond" not in inspect.getsource(getattr(diffusers, family.pipeline).__call__):
        raise FewstepError(
            f"This student takes a guidance scale as input (guidance_embedding), which "
            f"{family.pipeline} does not give its network; train it without to export it."
        )
    return {"guidance_scale": embedded}


def _check_adapter_fits(base: Path, family: Family, denoiser: LoRADenoiser) -> None:
    network = family.backbone.network_class
    if not hasattr(network, "load_lora_adapter"):
        raise FewstepError(
            f"diffusers reads no adapters for a {network.__name__}; leave --adapter out to export "
            "the merged network."
        )
    there = read_json(base / family.part / "config.json")
    if denoiser.backbone.guidance_input is not None and not there.get("time_cond_proj_dim"):
        raise FewstepError(
            "This LoRA adapts an input for the guidance scale (guidance_embedding), which the base "
            "pipeline's network has not; leave --adapter out to export the merged network."
        )


def _check_scheduler_stays(family: Family, scheduler: Any) -> None:
    name = type(scheduler).__name__
    if family.pipeline == "DDIMPipeline" and name != "DDIMScheduler":
        raise FewstepError(
            f"This student samples with {name}, and a DDIMPipeline puts its own scheduler in that "
            "one's place. Write DDPMPipeline into the base pipeline's model_index.json."
        )


def _size(base: Path, family: Family, shape: tuple[int, ...]) -> dict[str, Any]:
    """The size of the samples the student was trained on, as the pipeline takes it."""
    time, space = pixel_factors(base)
    found: dict[str, Any] = {"height": shape[-2] * space, "width": shape[-1] * space}
    if len(shape) == 4:
        found["num_frames"] = (shape[1] - 1) * time + 1
    return {**found, "use_resolution_binning": False}


def _notes(student: Student, base: Path, family: Family) -> list[str]:
    """What is to be known of a pipeline, besides its call."""
    notes = []
    parameters = inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters
    draws = any(chain.renoise and chain.num_steps > 1 for chain in student.chains)
    if draws and "eta" not in parameters:
        notes.append(
            f"{family.pipeline} does not hand its generator to the scheduler, so the fresh noise "
            "of its steps comes from torch's global generator: seed it with torch.manual_seed."
        )
    teacher = student.record.get("frozen", {}).get("teacher", {})
    if teacher.get("weights") == "pipeline" and teacher.get("sha256") != weights_hash(
        base, network_parts(base, family)
    ):
        notes.append(
            f"The network in the base pipeline '{base}' is not the teacher's (their hashes "
            "differ); its VAE and text encoders may not be the ones trained with."
        )
    return notes

"""Exporting class-conditional transformers that are no pipeline's: network, scheduler and card."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import FewstepError
from scripts.export.calls import Call
from scripts.export.folder import plain_network, write_network
from scripts.export.matching import FrontEnd
from scripts.export.snippets import GATES, transformer_snippet
from scripts.export.students import Exported, Request, Student, record_export


def export_transformer(request: Request, student: Student, folder: Path) -> Exported:
    """Writes a :class:`fewstep.networks.DiT` as ``transformer/`` and ``scheduler/``.

    Raises:
        FewstepError: if a base pipeline is given, or diffusers cannot sample as the student does.
    """
    if request.pipeline is not None or request.adapter:
        raise FewstepError(
            "This student belongs to no pipeline; leave --pipeline and --adapter out."
        )
    denoiser = student.denoiser
    match = student.match(FrontEnd(frozenset({"timesteps", "sigmas", "eta"})))
    calls = []
    for chain in student.chains:
        arguments = {
            "num_inference_steps": chain.num_steps,
            "guidance_scale": student.guidance,
            **match.steering[chain.num_steps].arguments,
        }
        calls.append(Call(chain.num_steps, arguments, times=chain.times.tolist()))
    beside = write_network(plain_network(denoiser), folder / "transformer", request.half)
    match.scheduler.save_pretrained(folder / "scheduler")
    name, classes = request.folder.name, denoiser.backbone.config["num_classes"]
    shape, told = denoiser.sample_shape, denoiser.backbone.learned_variance
    snippets = [
        transformer_snippet(name, call, match.scheduler, shape, classes, told, beside)
        for call in calls
    ]
    notes = [GATES] if beside else []
    return record_export(request, student, folder, match, calls, snippets, notes)

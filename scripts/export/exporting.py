"""From a checkpoint to an exported folder."""

from __future__ import annotations

from fewstep.networks import DiT
from scripts.export.folder import new_folder
from scripts.export.pipelines import export_pipeline
from scripts.export.students import Exported, Request, read_student
from scripts.export.transformers import export_transformer


def export(request: Request) -> Exported:
    """Exports a student.

    Raises:
        FewstepError: if there is no such checkpoint or base pipeline, they do not belong together,
            nothing in diffusers samples as the student does, or the folder is taken.
    """
    with new_folder(request.folder, request.overwrite) as folder:
        student = read_student(request)
        if isinstance(student.denoiser.backbone, DiT):
            return export_transformer(request, student, folder)
        return export_pipeline(request, student, folder)

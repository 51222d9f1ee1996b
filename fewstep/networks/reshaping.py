"""The same weights for samples of another shape: images first, then videos."""

from __future__ import annotations

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import FewstepError
from fewstep.spec import Spec

SHAPE_OPTIONS = ("sample_shape", "sample_size", "num_frames")
"""What backbones call those of their arguments that say the shape of samples."""


def for_samples_of(denoiser: Denoiser, other: Denoiser) -> Denoiser:
    """A denoiser with these very weights, for samples of another's shape.

    Only backbones that compute with a sample's own shape can do both, such as those with rotary or
    sinusoidal positions and U-Nets. All else stays as it was: schedule, prediction type, gates.

    Args:
        denoiser: it stays as it is; its tensors become those of what is returned.
        other: of the same class of backbone.

    Returns:
        the denoiser itself where the shapes agree.

    Raises:
        FewstepError: if the backbones are of different classes, or weights depend on the shape.
    """
    if denoiser.sample_shape == other.sample_shape:
        return denoiser
    own, wanted = denoiser.to_spec(), other.to_spec()["backbone"]
    told = (
        f"a network for samples of shape {list(denoiser.sample_shape)}, where those of "
        f"{list(other.sample_shape)} are wanted"
    )
    if own["backbone"]["class_path"] != wanted["class_path"]:
        raise FewstepError(
            f"This is {_class_name(own['backbone'])}, {told}, and {_class_name(wanted)} makes "
            "these: only weights of the same network can be taken over from one to the other."
        )
    options = {k: v for k, v in wanted["init_args"].items() if k in SHAPE_OPTIONS}
    arguments = {**own["backbone"]["init_args"], **options}
    if arguments == own["backbone"]["init_args"]:
        raise FewstepError(
            f"This is {told}, and nothing in its description says its shape. Give one that was "
            "trained on samples of the wanted shape."
        )
    made = Denoiser.from_spec({**own, "backbone": {**own["backbone"], "init_args": arguments}})
    try:
        made.load_state_dict(denoiser.state_dict(), assign=True)
    except RuntimeError as error:
        raise FewstepError(
            f"This is {told}, and its weights depend on the shape "
            f"({str(error).strip().splitlines()[-1].strip()}). Give one that was trained on "
            "samples of the wanted shape."
        ) from error
    if made.sample_shape != other.sample_shape:
        raise FewstepError(
            f"This is {told}; what they differ in is more than their size and length, so one "
            "network cannot make both."
        )
    made.requires_grad_(False).train(denoiser.training)
    return made


def _class_name(backbone: Spec) -> str:
    return str(backbone["class_path"]).rpartition(".")[2]

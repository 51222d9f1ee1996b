"""How diffusers pipelines call their network: its name, its branches, and the shape of a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.families import flux

Arguments = Mapping[str, Any]
Size = tuple[int, ...]


def _no_size(arguments: Arguments) -> Size:
    return ()


def _plain(sample: Tensor, size: Size) -> Tensor:
    return sample


def _flux_size(arguments: Arguments) -> Size:
    """Height and width of latents in tokens, from the places that the network is told."""
    places = arguments["img_ids"].reshape(-1, 3).amax(0).tolist()
    return (int(places[1]) + 1, int(places[2]) + 1)


def _flux(tokens: Tensor, size: Size) -> Tensor:
    """Latents ``(B, C, H, W)`` of tokens."""
    return flux.unpacked(tokens, 2 * size[0], 2 * size[1])


def _ltx_size(arguments: Arguments) -> Size:
    return (arguments["num_frames"], arguments["height"], arguments["width"])


def _ltx(tokens: Tensor, size: Size) -> Tensor:
    """Latents ``(B, C, F, H, W)`` of tokens."""
    return tokens.transpose(1, 2).unflatten(2, size)


@dataclass(frozen=True)
class Layout:
    """How a kind of pipeline calls its network.

    Attributes:
        part: the network's name in it.
        branches: the conditional and the unconditional branch of classifier-free guidance:
            ``together`` in one batch with the unconditional half first, ``reversed`` with it last,
            or ``apart`` in two calls, the conditional first.
        tells_scale: whether the pipeline knows its guidance scale while it runs.
        time_unit: what the network's times are multiplied with to give the scheduler's.
        size: of a run's latents, from what the network is called with; asked once a run.
        unpacked: latents as the decoder knows them, from what the network takes, and that size.
    """

    part: Literal["unet", "transformer"] = "unet"
    branches: Literal["together", "reversed", "apart"] = "together"
    tells_scale: bool = True
    time_unit: float = 1.0
    size: Callable[[Arguments], Size] = _no_size
    unpacked: Callable[[Tensor, Size], Tensor] = _plain


LAYOUTS: dict[str, Layout] = {
    "DDPMPipeline": Layout(),
    "DDIMPipeline": Layout(),
    "StableDiffusionPipeline": Layout(),
    "StableDiffusionImg2ImgPipeline": Layout(),
    "StableDiffusionXLPipeline": Layout(),
    "StableDiffusionXLImg2ImgPipeline": Layout(),
    "AnimateDiffPipeline": Layout(),
    "TextToVideoSDPipeline": Layout(tells_scale=False),
    "StableDiffusion3Pipeline": Layout("transformer"),
    "FluxPipeline": Layout("transformer", "apart", False, 1000.0, _flux_size, _flux),
    "PixArtSigmaPipeline": Layout("transformer", tells_scale=False),
    "DiTPipeline": Layout("transformer", "reversed", False),
    "LTXPipeline": Layout("transformer", size=_ltx_size, unpacked=_ltx),
    "WanPipeline": Layout("transformer", "apart"),
}
WITHOUT_BRANCHES = ("DDPMPipeline", "DDIMPipeline")
NEEDS_SCALE = ("TextToVideoSDPipeline", "PixArtSigmaPipeline", "DiTPipeline")


def layout_of(pipe: Any, guidance_scale: float | None) -> Layout:
    """A pipeline's layout.

    Args:
        guidance_scale: of classifier-free guidance, as far as the user has said it.

    Raises:
        FewstepError: if the pipeline is of another kind, or its scale is needed and not said.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    name = next((name for name in names if name in LAYOUTS), None)
    if name is None:
        raise FewstepError(
            f"Guidance does not know how a {names[0]} calls its network; it knows "
            f"{', '.join(LAYOUTS)}. Load its denoiser with fewstep.networks and use guided_sample."
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise FewstepError(f"This {name} has two networks in turn, and guidance takes one.")
    if name in NEEDS_SCALE and guidance_scale is None:
        raise FewstepError(
            f"A {name} tells nobody its scale of classifier-free guidance. Give guide() the same "
            "guidance_scale as the pipeline (1 is off)."
        )
    if LAYOUTS[name].tells_scale and guidance_scale is not None:
        raise FewstepError(f"A {name} tells its guidance_scale itself; leave it out of guide().")
    return LAYOUTS[name]


def scale_now(pipe: Any, layout: Layout, given: float | None) -> float:
    """The scale of classifier-free guidance of the run in progress; 1 is off.

    Raises:
        FewstepError: if the pipeline then changes predictions in a way that is not linear.
    """
    if getattr(pipe, "guidance_rescale", None):
        raise FewstepError(
            "guidance_rescale divides predictions by their deviation, so no shift of the network's "
            "output survives it as it is. Set guidance_rescale=0."
        )
    if not layout.tells_scale:
        scale = 1.0 if given is None else given
    elif getattr(pipe, "do_classifier_free_guidance", False):
        scale = float(pipe.guidance_scale)
    else:
        scale = 1.0
    return max(scale, 1.0)

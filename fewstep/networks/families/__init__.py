"""Model families, by the diffusers pipelines they come in."""

from fewstep.networks.families import (
    animatediff,
    ddpm,
    dit_imagenet,
    flux,
    ltx,
    modelscope,
    pixart,
    sd3,
    sdxl,
    stable_diffusion,
    wan,
)
from fewstep.networks.families.base import DiffusersBackbone
from fewstep.networks.families.family import Family

_MODULES = (
    stable_diffusion,
    sdxl,
    sd3,
    flux,
    pixart,
    dit_imagenet,
    modelscope,
    animatediff,
    wan,
    ltx,
    ddpm,
)
FAMILIES: dict[str, Family] = {module.FAMILY.pipeline: module.FAMILY for module in _MODULES}
FAMILIES[ddpm.WITH_DDIM.pipeline] = ddpm.WITH_DDIM

__all__ = ["FAMILIES", "DiffusersBackbone", "Family"]

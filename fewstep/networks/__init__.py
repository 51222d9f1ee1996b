"""Backbones behind one face, discriminators, weight averaging and the loading of trained ones."""

from fewstep.networks.discriminator import FeatureDiscriminator
from fewstep.networks.dit import DiT
from fewstep.networks.ema import ema_update, warmed_up_decay
from fewstep.networks.latte import Latte
from fewstep.networks.loading import LoadedDenoiser, find_checkpoint, load_denoiser
from fewstep.networks.mixture import RingMixture, ring
from fewstep.networks.uvit import UViT
from fewstep.networks.video_dit import VideoDiT

__all__ = [
    "DiT",
    "FeatureDiscriminator",
    "Latte",
    "LoadedDenoiser",
    "RingMixture",
    "UViT",
    "VideoDiT",
    "ema_update",
    "find_checkpoint",
    "load_denoiser",
    "ring",
    "warmed_up_decay",
]

"""Fields: how the parts of a record become the values of a batch."""

from datamodules.fields.base import Decoded, Field, Random
from datamodules.fields.images import Images, image_shape
from datamodules.fields.tensors import Latents, Tensors
from datamodules.fields.text import Caption, ClassLabel, Numbers
from datamodules.fields.videos import Videos

__all__ = [
    "Caption",
    "ClassLabel",
    "Decoded",
    "Field",
    "Images",
    "Latents",
    "Numbers",
    "Random",
    "Tensors",
    "Videos",
    "image_shape",
]

"""Streaming datamodules; each yields the Batch of :mod:`fewstep.contracts`."""

from datamodules.digits import Digits
from datamodules.images import ImageShards
from datamodules.mixture import RingData

__all__ = ["Digits", "ImageShards", "RingData"]

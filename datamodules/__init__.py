"""Streaming datamodules; each yields the Batch of :mod:`fewstep.contracts`."""

from datamodules.digits import Digits
from datamodules.mixed import Mixed
from datamodules.mixture import RingData
from datamodules.moving_digits import MovingDigits
from datamodules.paired import VideosWithImages
from datamodules.streaming import Shards

__all__ = ["Digits", "Mixed", "MovingDigits", "RingData", "Shards", "VideosWithImages"]

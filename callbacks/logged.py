"""Pictures and clips in whichever loggers a run has."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from callbacks.clips import encode


def log_picture(logger: Logger, name: str, image: Tensor, updates: int) -> None:
    """Logs a uint8 image ``(3, H, W)``; loggers that take no pictures are passed over."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, updates)
        return
    shown = Image.fromarray(image.permute(1, 2, 0).numpy())
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, shown, key=name, step=updates)
    elif callable(log_image := getattr(logger, "log_image", None)):
        log_image(name, [shown], step=updates)


def log_clip(
    logger: Logger, name: str, frames: Tensor, fps: float, updates: int, path: Path
) -> None:
    """Logs a clip.

    Args:
        frames: uint8 ``(F, 3, H, W)``.
        path: the animation's file, for loggers that keep files.
    """
    if isinstance(logger, TensorBoardLogger):
        # add_video needs moviepy and, with its version 2, silently logs nothing; TensorBoard plays
        # a GIF that is logged as an image.
        logger.experiment._get_file_writer().add_summary(_animation(name, frames, fps), updates)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), "samples")
    elif callable(log_video := getattr(logger, "log_video", None)):
        content: Any = io.BytesIO(encode(frames, fps, "gif"))
        log_video(name, [content], step=updates, format=["gif"])


def _animation(name: str, frames: Tensor, fps: float) -> Summary:
    height, width = frames.shape[-2:]
    image = Summary.Image(
        height=height,
        width=width,
        colorspace=3,
        encoded_image_string=encode(frames, fps, "gif"),
    )
    return Summary(value=[Summary.Value(tag=name, image=image)])

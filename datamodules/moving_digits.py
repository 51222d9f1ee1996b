"""Moving digits: videos of real handwritten digits and crisp pictures of them, no download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datamodules.fields import Caption, ClassLabel, Field, Images, Numbers, Videos
from datamodules.moving_clips import Kind, Scene, write_moving_digits
from datamodules.streaming import Shards
from fewstep.contracts import Batch


class MovingDigits(Shards):
    """Clips ``(1, F, H, W)`` of one or two digits that bounce, written as shards on first use.

    Conditions are ``class_labels``, the first digit's class, and ``prompt``, such as "a 3 and an 8
    moving". Needs the extra ``video``.

    Args:
        folder: where the shards are, or will be written; each kind has its own below it.
        kind: ``clear`` clips; ``watermarked`` ones, blurred and with a mark that stands still; or
            ``crisp`` images ``(1, H, W)``, frames of other clips with neither.
        num_clips, num_held_out: training clips and held-out clips, whose digits are others.
        num_frames: frames of a clip.
        image_size: side of a frame.
        max_digits: a clip has one digit to this many.
        blur: of watermarked clips, standard deviation in pixels.
        reference: the kind that metrics compare with, of the same motion where both are videos; by
            default the data's own.
        end_position: tells as a condition of this name where the first digit's centre is in the
            last frame, ``(B, 2)`` x and y in pixels: for guidance, as no network takes it.
        batch_size: records a device and update.
        num_workers: loading processes a device.
        seed: of the order and the clips.
    """

    def __init__(
        self,
        folder: str = "data/moving_digits",
        kind: Kind = "clear",
        num_clips: int = 4096,
        num_held_out: int = 256,
        num_frames: int = 16,
        image_size: int = 32,
        max_digits: int = 2,
        blur: float = 1.0,
        reference: Kind | None = None,
        end_position: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.scene = Scene(num_frames=num_frames, size=image_size, max_digits=max_digits, blur=blur)
        self.kind: Kind = kind
        self.num_clips, self.num_held_out = num_clips, num_held_out
        look = f"{num_frames}x{image_size}-digits{max_digits}"
        look += f"-blur{blur:g}" if kind == "watermarked" else ""
        self.folder = Path(folder) / f"{kind}-{look}-{num_clips}-seed{seed}"
        conditions: dict[str, Field] = {
            "class_labels": ClassLabel(num_classes=10),
            "prompt": Caption(),
        }
        if end_position:
            conditions["end_position"] = Numbers("centres.0.-1", count=2)
        super().__init__(
            shards=f"{self.folder}/train-*.tar",
            val_shards=f"{self.folder}/val-*.tar",
            batch_size=batch_size,
            sample=(
                Images(size=image_size, channels=1)
                if kind == "crisp"
                else Videos(num_frames, image_size, channels=1)
            ),
            conditions=conditions,
            num_workers=num_workers,
            seed=seed,
        )

        self.compared: MovingDigits | None = None
        if reference not in (None, kind):
            self.compared = MovingDigits(
                folder,
                reference,
                num_clips,
                num_held_out,
                num_frames,
                image_size,
                max_digits,
                blur,
                end_position=end_position,
                batch_size=batch_size,
                num_workers=num_workers,
                seed=seed,
            )

    def prepare_data(self) -> None:
        """Writes the shards unless they exist."""
        if not self.folder.exists():
            write_moving_digits(
                self.folder,
                self.kind,
                self.num_clips,
                self.num_held_out,
                self.seed,
                scene=self.scene,
            )
        super().prepare_data()
        if self.compared is not None:
            self.compared.prepare_data()

    def reference_batches(self, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """The training records of the kind that metrics compare with, once, in order."""
        if self.compared is not None:
            return self.compared.reference_batches(rank, world_size)
        return super().reference_batches(rank, world_size)

    def reference_protocol(self) -> dict[str, Any]:
        """Which records those are."""
        if self.compared is not None:
            return self.compared.reference_protocol()
        return super().reference_protocol()

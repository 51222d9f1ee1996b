"""Have samples left the data? Their distance to the nearest datum, beside that of unseen data."""

from __future__ import annotations

from typing import Any

from fewstep.errors import FewstepError
from fewstep.metrics.arithmetic import compute_device
from fewstep.metrics.base import Better, Metric, Statistics
from fewstep.metrics.judging import nearest_distance_ratio
from fewstep.metrics.rows import Rows


class NearestDataDistance(Metric):
    """``nearest_data_ratio``: distance to the nearest datum, where 1 is that of unseen data.

    The mean over samples of the Euclidean distance, of pixels in [-1, 1], to the nearest of every
    second datum, over that of the data between them. Well above 1 samples have left the data's
    manifold, as guidance that is too strong drives them to. Copies of all the data have 0.5: half
    of them are among those that distances are measured to.

    Args:
        most: samples of a set that are kept, those with the smallest numbers.
    """

    def __init__(self, most: int = 4096) -> None:
        self.most = most
        self.better: dict[str, Better] = {"nearest_data_ratio": "lower"}

    def statistics(self) -> Rows:
        return Rows(["pixels"], self.most)

    def compute(self, generated: Statistics, reference: Statistics | None) -> dict[str, float]:
        assert isinstance(generated, Rows)
        assert isinstance(reference, Rows)
        made, real = (rows["pixels"].to(compute_device()) for rows in (generated, reference))
        if len(real) < 2:
            raise FewstepError("NearestDataDistance needs two data or more to compare with.")
        ratio = nearest_distance_ratio(made, real[::2], real[1::2])
        return {"nearest_data_ratio": float(ratio)}

    def protocol(self) -> dict[str, Any]:
        return {"metric": "nearest_data_ratio", "space": "pixels", "most": self.most}

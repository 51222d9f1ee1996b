"""Class labels that a network may be given."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.errors import FewstepError


def check_labels(network: nn.Module, labels: Tensor | None, has_classes: bool) -> None:
    """Makes sure that a network with classes is told them, and another one is not.

    Raises:
        FewstepError: if there are labels and no classes, or the other way round.
    """
    if (labels is not None) != has_classes:
        says = "needs class labels" if has_classes else "has no classes"
        raise FewstepError(
            f"This {type(network).__name__} {says} and the data say otherwise; change num_classes "
            "or data.conditions."
        )

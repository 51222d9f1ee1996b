"""Who guided the samples and who judges them: a judge that is the guide finds what it put there."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from fewstep.contracts import SteeredSampler
from fewstep.errors import FewstepError
from fewstep.metrics import Metric
from fewstep.metrics.fingerprints import shares_weights


def check_judges(metrics: Sequence[Metric], module: pl.LightningModule) -> None:
    """Looks for judges that took part in sampling, and for guides that are named and did not.

    Networks that metrics have not loaded yet are not looked at: ask again once they are there.

    Raises:
        FewstepError: if there is one.
    """
    guides = module.guides() if isinstance(module, SteeredSampler) else None
    if guides is None:
        return
    for metric in metrics:
        name = type(metric).__name__
        for judge in metric.judges():
            if any(shares_weights(judge, guide) for guide in guides):
                raise FewstepError(
                    f"{name} would judge samples by the {type(judge).__name__} that guides "
                    "them, so it would find whatever the guide put there. Give it a judge of "
                    "another kind, or one that was trained on other data."
                )
        for named in metric.guides():
            if not any(shares_weights(named, guide) for guide in guides):
                known = ", ".join(type(guide).__name__ for guide in guides)
                raise FewstepError(
                    f"{name} takes a {type(named).__name__} for the guide, but samples are guided "
                    f"by {known or 'no network'}. Give it the network of the steering's energy, "
                    "with the same weights, or leave it out of the Evaluation callback's `metrics`."
                )

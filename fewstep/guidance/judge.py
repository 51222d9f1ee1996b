"""Judges: what says how good guided samples are, and had no part in making them.

Strengths that are tuned by the guide's own opinion reward samples that fool it. So a judge is no
energy, and one that looks through the guide's network, or a copy of it, is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.guidance.energies import Energy, Target
from fewstep.guidance.freezing import modules_within, things_within
from fewstep.metrics.fingerprints import shares_weights


class Judge(ABC):
    """Scores finished samples, higher is better.

    A class cannot be both a judge and an energy.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, Energy):
            raise TypeError(
                f"{cls.__name__} is both a Judge and an Energy. A guide cannot judge its own "
                "samples: give the judge a network, or data, that the energy knows nothing of."
            )

    @abstractmethod
    def __call__(self, samples: Tensor, target: Target) -> Tensor:
        """Scores ``(N,)`` of samples ``(N, ...)``, whose mean is compared.

        Args:
            target: what was wanted of each sample, ``(N, ...)``.
        """


def refuse_guide_as_judge(judge: Judge, energy: Energy) -> None:
    """Refuses a judge that is the guide in disguise.

    Both are searched for networks in all that they hold. Two networks are the same as
    :func:`fewstep.metrics.fingerprints.shares_weights` has it, so copies, wrappers and parts are
    known.

    Raises:
        FewstepError: if the judge is or holds the energy, or if they share a network.
    """
    # By its ancestors, as a class whose making was refused shares their caches of isinstance().
    ancestors = type(judge).__mro__
    if Judge not in ancestors or Energy in ancestors:
        raise FewstepError(
            f"{type(judge).__name__} is no Judge. Results are compared by one: derive it from "
            "fewstep.guidance.Judge, with a network or data that the guide knows nothing of."
        )
    asked = energy.staged()[1]  # both may see pictures through the same decoder
    if any(thing is energy or thing is asked for thing in things_within(judge)):
        raise FewstepError(
            f"{type(judge).__name__} holds the guide's own energy, {type(energy).__name__}. "
            "Judge with something that the guide knows nothing of."
        )
    guided = list(modules_within(asked))
    for ours in modules_within(judge):
        for theirs in guided:
            if shares_weights(ours, theirs):
                raise FewstepError(
                    f"{type(judge).__name__} looks through the network of the guide "
                    f"({type(theirs).__name__}), or a copy of it. It would reward samples that "
                    "fool the guide: judge with a network that was trained on other data."
                )

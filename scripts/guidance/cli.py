"""A search as a command that takes an experiment, on one device."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl

from scripts.cli import FewstepCLI
from scripts.experiments import SEARCH, find_experiment, with_defaults
from scripts.guidance.trainer import SearchTrainer

# A trial's samples are few.
ONE_DEVICE: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


class SearchCLI(FewstepCLI):
    """``fewstep guidance search``: the experiment's configuration, and the search's options."""

    made_trainer = SearchTrainer
    prog = "fewstep guidance"

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Tells the trainer how the configuration names what guides."""
        trainer = cast(SearchTrainer, super().instantiate_trainer(**ONE_DEVICE, **kwargs))
        config = self.config[self.subcommand]
        trainer.model_config = config.model.as_dict()
        return trainer


def with_search_files(arguments: list[str]) -> list[str]:
    """Puts the ``search.yaml`` of the folders of each experiment named in front of it."""
    expanded: list[str] = []
    for token, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if token in ("-c", "--config") and value:
            files = with_defaults(find_experiment(value))
            for folder in dict.fromkeys(file.parent for file in files):
                if (folder / SEARCH).is_file():
                    expanded += ["-c", str(folder / SEARCH)]
        expanded.append(token)
    return expanded

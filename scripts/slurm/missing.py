"""What a run will look for at its start and is not there yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from jsonargparse import ArgumentParser

from fewstep.errors import FewstepError
from fewstep.metrics import Metric
from fewstep.networks.folders import find_folder
from fewstep.networks.loading import find_checkpoint
from scripts.callback_options import class_name
from scripts.config_errors import reasons_within

SOURCES = ("teacher", "start", "pipeline", "folder")
SHARDS = ("shards", "val_shards")


def missing(config: Mapping[str, Any]) -> list[str]:
    """Networks, local shards and weights of metrics that an experiment names and that are not here.

    Nothing is built, and nothing is read but the weights that have a published hash.

    Args:
        config: of ``fewstep fit``, resolved, in plain values.

    Returns:
        a line for each, naming the key and what to do.
    """
    found = [
        f"{key}: {reason}"
        for key, source in _named(config.get("model"), SOURCES, "model")
        if (reason := _no_network(source))
    ]
    for key, patterns in _named(config.get("data"), SHARDS, "data"):
        lost = [pattern for pattern in patterns if not _there(pattern)]
        found += [f"{key}: there is no file '{pattern}'." for pattern in lost]
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        if class_name(callback) == "Evaluation":
            found += _without_weights((callback.get("init_args") or {}).get("metrics") or [])
    return found


def _named(within: Any, names: Sequence[str], place: str) -> Iterator[tuple[str, Any]]:
    """The keys of such names that have a text, or a list of texts, wherever they stand."""
    if isinstance(within, Mapping):
        for key, value in within.items():
            texts = [value] if isinstance(value, str) else value
            plain = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            if key in names and plain and texts:
                yield f"{place}.{key}", texts if names is SHARDS else texts[0]
            else:
                yield from _named(value, names, f"{place}.{key}")
    elif isinstance(within, list):
        for number, value in enumerate(within):
            yield from _named(value, names, f"{place}[{number}]")


def _no_network(source: str) -> str | None:
    """Why there is no network where one is looked for; None where there is."""
    try:
        find_checkpoint(source)
    except FewstepError as untrained:
        try:
            folder = find_folder(source)
        except FewstepError as unknown:
            return str(untrained if source.startswith("runs/") else unknown)
        return None if (folder / "model_index.json").is_file() else str(untrained)
    return None


def _there(pattern: str) -> bool:
    """Whether a local pattern has a file; addresses, and what cannot be read, are believed."""
    if "://" in pattern or Path(pattern).expanduser().exists():
        return True
    try:
        paths = [Path(one).expanduser().absolute() for one in braceexpand(pattern)]
    except ValueError:
        return True
    return all(any(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) for path in paths)


def _without_weights(metrics: list[Any]) -> list[str]:
    """Of the metrics whose weights are looked for when a run starts.

    Those with an energy or a classifier of their own would load or train it as they are made.
    """
    found = list[str]()
    for metric in metrics:
        text = json.dumps(metric)
        if "fewstep.guidance" in text or "GuideAndJudge" in text or "digit" in text.lower():
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--metric", type=Metric)
        try:
            built = parser.instantiate(parser.parse_object({"metric": metric})).metric
            if built.features is not None:
                built.features.prepare()
        except (FewstepError, ValueError, ImportError) as error:
            found.append(f"{class_name(metric)}: {reasons_within(str(error)) or error}")
    return list(dict.fromkeys(found))

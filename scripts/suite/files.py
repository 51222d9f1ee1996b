"""Suite files: which experiments to run, with which overrides, steps and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import FewstepError, nearest
from scripts.experiments import SUITES, experiments_roots, short_name

TEACHER_KEY = "model.init_args.teacher"
SHARED_KEYS = ("seeds", "set", "grid", "steps")
SUITE_KEYS = ("name", "experiments", *SHARED_KEYS)
ENTRY_KEYS = ("experiment", "label", "after", *SHARED_KEYS)
PLAIN_NAME = re.compile(r"[\w.+=,-]+")
# What the suite itself decides for every run.
OURS = {
    "seed_everything": "`seeds`",
    "model.init_args.step_counts": "`steps`",
    "run": "`name` and `label`",
    "ckpt_path": "nothing: runs that were cut short go on by themselves",
}


@dataclass(frozen=True)
class Entry:
    """One experiment of a suite.

    Attributes:
        label: its name in the suite, and its folder's.
        overrides: dotted configuration key to value.
        after: configuration key to the label of the entry whose trained run it is given.
        steps: sampling step counts to measure at; the experiment's by default.
        own_steps: whether the entry itself asks for them, not the suite for all its entries.
        grid: dotted key to the values it takes in turn; several keys with commas between them to
            lists of as many values, which they take together.
    """

    label: str
    experiment: str
    seeds: tuple[int, ...]
    overrides: dict[str, Any] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None
    own_steps: bool = False
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A suite file, checked by itself; the experiments it names are yet to be."""

    path: Path
    name: str
    entries: tuple[Entry, ...]


def find_suite(name: str) -> Path:
    """Resolves a path, or a short name below ``experiments/suites/``.

    Raises:
        FewstepError: naming the most similar suite there is.
    """
    folders = [root / SUITES for root in experiments_roots()]
    below = [folder / file for folder in folders for file in (name, f"{name}.yaml")]
    for candidate in (Path(name), *below, Path(f"{name}.yaml")):
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    hint = nearest(name.removesuffix(".yaml").rpartition("/")[2], known)
    raise FewstepError(f"There is no suite '{name}'.{hint} Known: {', '.join(known)}.")


def read_suite(path: Path, seeds: Iterable[int] | None = None) -> Suite:
    """Reads a suite file.

    Args:
        seeds: training seeds in place of the suite's; entries with seeds of their own keep them.

    Raises:
        FewstepError: naming the entry and key that is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FewstepError(f"The suite '{path}' cannot be read: {error}.") from error
    where = f"The suite '{path}'"
    check_keys(content, SUITE_KEYS, where)
    shared = {key: content[key] for key in SHARED_KEYS if key in content}
    if seeds is not None:
        shared["seeds"] = list(seeds)
    found = content.get("experiments")
    if not isinstance(found, list) or not found:
        raise FewstepError(f"{where} has no list of `experiments`.")
    entries = tuple(
        read_entry(entry, shared, f"{where}, entry {n}") for n, entry in enumerate(found, 1)
    )
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise FewstepError(f"{where} has two entries '{label}'; give one a `label` of its own.")
    return Suite(path, plain(content.get("name", path.stem), f"{where}: `name`"), entries)


def read_entry(content: Any, shared: Mapping[str, Any], where: str) -> Entry:
    """One entry, with what the suite says for all of them.

    An entry's ``set`` adds to the suite's; its seeds, steps and grid replace the suite's.

    Raises:
        FewstepError: naming the key that is wrong.
    """
    if isinstance(content, str):
        content = {"experiment": content}
    check_keys(content, ENTRY_KEYS, where)
    experiment = content.get("experiment")
    if not isinstance(experiment, str):
        raise FewstepError(f"{where} names no `experiment`, such as digits/lcm.")
    label = content.get("label", short_name(Path(experiment)).rpartition("/")[2])
    where = f"{where} ({label})"
    given = {**shared, **{key: content[key] for key in SHARED_KEYS if key in content}}
    overrides = {**mapping(shared, "set", where), **mapping(content, "set", where)}
    grid = mapping(given, "grid", where)
    after = content.get("after", {})
    after = {TEACHER_KEY: after} if isinstance(after, str) else mapping(content, "after", where)
    gridded = [key for together in grid for key in keys_of(together)]
    for key in (*overrides, *gridded, *after):
        refuse_ours(key, where)
    for key, values in grid.items():
        check_values(key, values, where)
    return Entry(
        label=plain(label, f"{where}: `label`"),
        experiment=experiment,
        seeds=numbers(given.get("seeds", [0]), 0, f"{where}: `seeds`"),
        overrides=overrides,
        after={key: str(parent) for key, parent in after.items()},
        steps=numbers(given["steps"], 1, f"{where}: `steps`") if given.get("steps") else None,
        own_steps="steps" in content,
        grid=grid,
    )


def keys_of(together: str) -> list[str]:
    """The dotted keys that a grid sets together: ``a.b, c.d`` are two."""
    return [key.strip() for key in together.split(",")]


# ---------------------------------------------------------------------- checks


def check_values(together: str, values: Any, where: str) -> None:
    """Refuses what is no list of values for a grid's key, or for its keys together."""
    if not isinstance(values, list) or not values:
        raise FewstepError(f"{where}: `grid` has no list of values for '{together}'.")
    count = len(keys_of(together))
    for value in values if count > 1 else []:
        if not isinstance(value, list) or len(value) != count:
            raise FewstepError(
                f"{where}: `grid` sets {count} keys together, '{together}', and {value} is no list "
                f"of {count} values."
            )


def check_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    """Refuses what is no mapping, and keys that are not known."""
    if not isinstance(content, dict):
        raise FewstepError(f"{where} is no mapping with the keys {', '.join(known)}.")
    for key in content:
        if key not in known:
            raise FewstepError(
                f"{where} has an unknown key '{key}'.{nearest(str(key), known)} "
                f"Known: {', '.join(known)}."
            )


def mapping(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The mapping under a key, empty if there is none."""
    value = content.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise FewstepError(f"{where}: `{key}` is no mapping from keys such as trainer.max_steps.")
    return dict(value)


def numbers(value: Any, smallest: int, where: str) -> tuple[int, ...]:
    """A list of different whole numbers."""
    whole = isinstance(value, list) and all(type(n) is int and n >= smallest for n in value)
    if not whole or not value or len(set(value)) < len(value):
        raise FewstepError(
            f"{where} is no list of different whole numbers from {smallest} on: {value}."
        )
    return tuple(value)


def plain(value: Any, where: str) -> str:
    """A name that can be a folder's."""
    text = str(value)
    if not PLAIN_NAME.fullmatch(text) or text.startswith("."):
        raise FewstepError(f"{where} is '{text}', but it names a folder: letters, digits, _ . - +")
    return text


def refuse_ours(key: str, where: str) -> None:
    """Refuses to override what the suite decides itself."""
    for ours, instead in OURS.items():
        if key == ours or key.startswith(f"{ours}."):
            raise FewstepError(f"{where} sets '{key}'; a suite has {instead} for that.")

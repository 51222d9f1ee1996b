"""Finding experiment files and the defaults they build on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import FewstepError, nearest

DEFAULTS = "defaults.yaml"
SEARCH = "search.yaml"  # a folder's options of `fewstep guidance search`, and no experiment
SUITES = "suites"  # a folder of files that name experiments and are none


def experiments_root() -> Path:
    """The ``experiments`` folder: of the working directory, the source tree or the package."""
    scripts = Path(__file__).resolve().parent
    candidates = (Path("experiments"), scripts.parent / "experiments", scripts / "experiments_data")
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def known_experiments() -> list[str]:
    """The short names of all experiments."""
    root = experiments_root()
    files = [path for path in sorted(root.rglob("*.yaml")) if path.name not in (DEFAULTS, SEARCH)]
    return [short_name(path) for path in files if path.parent != root / SUITES]


def find_experiment(name: str) -> Path:
    """Resolves a path, or a short name below ``experiments/`` such as ``digits/pcm``.

    Raises:
        FewstepError: naming the most similar experiment there is.
    """
    root = experiments_root()
    for candidate in (Path(name), root / name, root / f"{name}.yaml", Path(f"{name}.yaml")):
        if candidate.is_file():
            return candidate
    known = known_experiments()
    asked = name.removesuffix(".yaml").removeprefix("experiments/")
    listed = ", ".join(known)
    raise FewstepError(f"There is no experiment '{name}'.{nearest(asked, known)} Known: {listed}.")


def short_name(path: Path) -> str:
    """``experiments/digits/pcm.yaml`` is ``digits/pcm``; files elsewhere go by their stem."""
    parts = path.resolve().with_suffix("").parts
    for folder in ("experiments", "experiments_data"):
        if folder in parts:
            last = len(parts) - 1 - parts[::-1].index(folder)
            return "/".join(parts[last + 1 :])
    return path.stem


def with_defaults(path: Path) -> list[Path]:
    """The files that make up an experiment: ``defaults.yaml`` of each folder, outermost first."""
    root = experiments_root().resolve()
    resolved = path.resolve()
    if root not in resolved.parents:
        return [path]
    folders = [root]
    for part in resolved.parent.relative_to(root).parts:
        folders.append(folders[-1] / part)
    found = [folder / DEFAULTS for folder in folders if (folder / DEFAULTS).is_file()]
    return [Path(os.path.relpath(file)) for file in found] + [path]


def expand_steering(arguments: list[str]) -> tuple[list[str], str | None]:
    """Replaces the experiment that ``--steering`` names by what it says of steering.

    Returns:
        the arguments for the parser, and a name for the steering if there is any.

    Raises:
        FewstepError: for an experiment that there is not, or that steers nothing.
    """
    expanded: list[str] = []
    name: str | None = None
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token.startswith("--steering"):
            name = name or "steered"
        given = token.removeprefix("--steering=") if token.startswith("--steering=") else None
        if token == "--steering" and rest:
            given = rest.pop(0)
        if given is None or given.lstrip().startswith("{"):
            expanded += [token] if given is None or "=" in token else [f"--steering={given}"]
            continue
        path = find_experiment(given)
        name = short_name(path).rpartition("/")[2]
        expanded.append(f"--steering={json.dumps(steering_in(path))}")
    return expanded, name


def steering_in(path: Path) -> dict[str, Any]:
    """What an experiment says of steering, its defaults included.

    Raises:
        FewstepError: if it says nothing.
    """
    found: dict[str, Any] = {}
    for file in with_defaults(path):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        options = (content.get("model") or {}).get("init_args") or {}
        found = _merged(found, options.get("steering") or {})
    if not found:
        raise FewstepError(
            f"'{path}' has no model.init_args.steering to take. Give an experiment of "
            "TrainingFreeGuidance, such as guidance/digits/polyak."
        )
    return found


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second mapping over the first; another class brings none of the first one's options."""
    if first.get("class_path") != second.get("class_path", first.get("class_path")):
        return second
    both = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            both[key] = _merged(first[key], second[key])
    return both


def expand_arguments(arguments: list[str]) -> tuple[list[str], str | None]:
    """Replaces experiment names by files with their defaults, and ``--steps 1 2`` by a list.

    Returns:
        the arguments for the parser, and the short name of the last experiment named.
    """
    expanded: list[str] = []
    name: str | None = None
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token.startswith("--config="):
            token, value = token.split("=", 1)
            rest.insert(0, value)
        if token in ("-c", "--config") and rest:
            path = find_experiment(rest.pop(0))
            # A resolved config of an earlier run is complete and says itself what it is.
            name = short_name(path) if path.name != "config.yaml" else name
            for file in with_defaults(path):
                expanded += ["--config", str(file)]
        elif token in ("--steps", "--seeds", "--roles"):
            values = []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            plain = [v for value in values for v in value.strip("[]").replace(",", " ").split()]
            expanded.append(f"{token}=[{','.join(plain)}]")
        else:
            expanded.append(token)
    return expanded, name

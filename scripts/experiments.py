"""Finding experiment files and the defaults they build on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from fewstep.errors import FewstepError, nearest
from scripts.callback_options import set_callbacks

DEFAULTS = "defaults.yaml"
RESOLVED = "config.yaml"  # of a run: complete, and read as it is
SEARCH = "search.yaml"  # a folder's options of `fewstep guidance search`, and no experiment
SUITES = "suites"  # a folder of files that name experiments and are none


def experiments_roots() -> list[Path]:
    """The ``experiments`` folders: the working directory's, then those shipped with fewstep."""
    scripts = Path(__file__).resolve().parent
    candidates = (Path("experiments"), scripts.parent / "experiments", scripts / "experiments_data")
    found: dict[Path, Path] = {}
    for folder in filter(Path.is_dir, candidates):
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def known_experiments() -> list[str]:
    """The short names of all experiments, those of the working directory first."""
    return list(
        dict.fromkeys(
            short_name(path)
            for root in experiments_roots()
            for path in sorted(root.rglob("*.yaml"))
            if path.name not in (DEFAULTS, SEARCH) and path.parent != root / SUITES
        )
    )


def find_experiment(name: str) -> Path:
    """Resolves a path, or a short name below an ``experiments/`` folder such as ``digits/pcm_4``.

    Raises:
        FewstepError: naming the most similar experiment there is.
    """
    asked = name.removeprefix("experiments/")
    below = [root / file for root in experiments_roots() for file in (asked, f"{asked}.yaml")]
    for candidate in (Path(name), *below, Path(f"{name}.yaml")):
        if candidate.is_file():
            return candidate
    asked, known = asked.removesuffix(".yaml"), known_experiments()
    a_folder = any(other.startswith(f"{asked}/") for other in known)
    hint = "" if a_folder else nearest(asked, known)
    raise FewstepError(f"There is no experiment '{name}'.{hint} {_listed(asked, known)}")


def _listed(asked: str, known: list[str]) -> str:
    """The experiments of the folder that was asked for; else, which folders there are."""
    folder_of = {name: name.rpartition("/")[0] for name in known}
    for folder in (asked, asked.rpartition("/")[0]):
        within = [name for name in known if folder_of[name] == folder]
        if within:
            return f"In {folder}/ there are: {', '.join(within)}."
    top = asked.partition("/")[0]
    folders = dict.fromkeys(filter(None, folder_of.values()))
    near = [folder for folder in folders if folder.split("/")[0] == top]
    return f"Folders of experiments: {', '.join(near or folders)}."


def short_name(path: Path) -> str:
    """``experiments/digits/pcm.yaml`` is ``digits/pcm``; files elsewhere go by their stem."""
    parts = path.resolve().with_suffix("").parts
    for folder in ("experiments", "experiments_data"):
        if folder in parts:
            last = len(parts) - 1 - parts[::-1].index(folder)
            return "/".join(parts[last + 1 :])
    return path.stem


def with_defaults(path: Path) -> list[Path]:
    """The files that make up an experiment: ``defaults.yaml`` of each folder, outermost first.

    The outermost is that of its own ``experiments`` folder; where that has none, or the file is in
    no such folder, the one shipped with fewstep. A run's resolved configuration needs none.
    """
    roots = [root.resolve() for root in experiments_roots()]
    within = path.resolve().parent
    folders = []
    for root in roots:
        if within.is_relative_to(root):
            below = within.relative_to(root)
            folders = [root, *(root / part for part in reversed([below, *below.parents][:-1]))]
            break
    found = [folder / DEFAULTS for folder in folders]
    if path.name != RESOLVED and roots and not (found and found[0].is_file()):
        found.insert(0, roots[-1] / DEFAULTS)
    return [Path(os.path.relpath(file)) for file in found if file.is_file()] + [path]


def read_experiment(path: Path) -> dict[str, Any]:
    """What an experiment's file says, without its defaults.

    Raises:
        FewstepError: naming the line, if it is no YAML; or if it has no keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise FewstepError(f"{path}{place}: {error.problem or error.context}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FewstepError(f"'{path}' cannot be read as YAML: {error}.") from error
    if not isinstance(content, dict | None):
        raise FewstepError(f"'{path}' is no experiment: it has no keys, such as `trainer:`.")
    return content or {}


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
        options = (read_experiment(file).get("model") or {}).get("init_args") or {}
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

    Options of single callbacks, such as ``--trainer.callbacks.Evaluation.num_samples``, become part
    of the list of callbacks.

    Returns:
        the arguments for the parser, and the short name of the last experiment named.

    Raises:
        FewstepError: for an experiment that there is not, a file that is no YAML, or a callback
            that the experiment does not have.
    """
    expanded: list[str] = []
    name: str | None = None
    contents: dict[str, dict[str, Any]] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token.startswith(("--config=", "--steps=", "--seeds=", "--roles=")):
            token, value = token.split("=", 1)
            rest.insert(0, value)
        if token in ("-c", "--config") and rest:
            path = find_experiment(rest.pop(0))
            # A resolved config of an earlier run is complete and says itself what it is.
            name = short_name(path) if path.name != RESOLVED else name
            for file in with_defaults(path):
                # What a second file sets is not undone by defaults that came with the first.
                if file == path or str(file) not in contents:
                    contents[str(file)] = read_experiment(file)
                    expanded += ["--config", str(file)]
        elif token in ("--steps", "--seeds", "--roles"):
            values = []
            while rest and (not rest[0].startswith("-") or rest[0][1:].isdigit()):
                values.append(rest.pop(0))
            plain = [v for value in values for v in value.strip("[]").replace(",", " ").split()]
            expanded.append(f"{token}=[{','.join(plain)}]")
        else:
            expanded.append(token)
    return set_callbacks(expanded, contents), name

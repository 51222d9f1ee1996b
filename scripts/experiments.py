"""Finding experiment files and the defaults they build on."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.errors import FewstepError, nearest

DEFAULTS = "defaults.yaml"
SUITES = "suites"  # a folder of files that name experiments and are none


def experiments_root() -> Path:
    """The ``experiments`` folder: of the working directory, the source tree or the package."""
    scripts = Path(__file__).resolve().parent
    candidates = (Path("experiments"), scripts.parent / "experiments", scripts / "experiments_data")
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def known_experiments() -> list[str]:
    """The short names of all experiments."""
    root = experiments_root()
    files = [path for path in sorted(root.rglob("*.yaml")) if path.name != DEFAULTS]
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

"""Options of one callback among a list of them: ``trainer.callbacks.Evaluation.num_samples``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fewstep.errors import FewstepError, nearest

CALLBACKS = "trainer.callbacks"
# A class's name, unlike an option of the last callback, begins with a capital letter.
_OPTION = re.compile(rf"--({re.escape(CALLBACKS)}\.[A-Z][^=]*)(?:=(.*))?", re.S)
_WHOLE = re.compile(rf"--{re.escape(CALLBACKS)}(?:=(.*))?", re.S)


def with_callbacks(callbacks: list[dict[str, Any]], changes: Mapping[str, Any]) -> list[Any]:
    """A list of callbacks in which ``trainer.callbacks.Evaluation.num_samples`` and such are set.

    Raises:
        FewstepError: for a callback that is not in the list.
    """
    changed = [{**c, "init_args": dict(c.get("init_args") or {})} for c in callbacks or []]
    by_name = {class_name(callback): callback["init_args"] for callback in changed}
    for key, value in changes.items():
        name, _, option = key.removeprefix(f"{CALLBACKS}.").partition(".")
        if name not in by_name or not option:
            raise FewstepError(
                f"'{key}' sets no callback of this experiment.{nearest(name, by_name)} It has: "
                f"{', '.join(by_name)}; write {CALLBACKS}.{next(iter(by_name), 'NAME')}.OPTION."
            )
        *folders, last = option.removeprefix("init_args.").split(".")
        target = by_name[name]
        for folder in folders:
            target = target.setdefault(folder, {})
        target[last] = value
    return changed


def class_name(callback: Mapping[str, Any]) -> str:
    """The last part of a ``class_path``."""
    return str(callback["class_path"]).rpartition(".")[2]


def set_callbacks(arguments: list[str], contents: Mapping[str, Any]) -> list[str]:
    """Sets options of single callbacks, which a parser that knows only the list does not.

    Args:
        arguments: a command line, experiments replaced by their files.
        contents: of these files, as they are named there.

    Returns:
        the command line without such options, and with the changed list behind what had set it.

    Raises:
        FewstepError: for a callback that is not in the list, or an option without a value.
    """
    rest, kept = list(arguments), list[str]()
    changes: dict[str, Any] = {}
    callbacks: Any = None
    place = 0
    while rest:
        token = rest.pop(0)
        if option := _OPTION.fullmatch(token):
            if option[2] is None and not rest:
                raise FewstepError(f"{token} lacks its value.")
            changes[option[1]] = _value(rest.pop(0) if option[2] is None else option[2])
            continue
        kept.append(token)
        whole = _WHOLE.fullmatch(token)
        if (token == "--config" or (whole and whole[1] is None)) and rest:
            kept.append(rest.pop(0))
        if token == "--config":
            trainer = (contents.get(kept[-1]) or {}).get("trainer") or {}
            found = trainer.get("callbacks")
        else:
            found = _value(whole[1] or kept[-1]) if whole else None
        if found is not None:
            callbacks, place = found, len(kept)
    if not changes:
        return kept
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    listed = [{"class_path": one} if isinstance(one, str) else one for one in listed]
    changed = {"trainer": {"callbacks": with_callbacks(listed, changes)}}
    return [*kept[:place], "--config", json.dumps(changed), *kept[place:]]


def _value(text: str) -> Any:
    """What is meant by a value on the command line; YAML takes 1e-4 for a text."""
    found = yaml.safe_load(text)
    try:
        return float(found) if isinstance(found, str) and found[:1] in "+-.0123456789" else found
    except ValueError:
        return found

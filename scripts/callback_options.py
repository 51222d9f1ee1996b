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
_SMALL = re.compile(rf"--{re.escape(CALLBACKS)}\.([a-z_]+)\.[^=]+(?:=.*)?", re.S)
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


def listed(callbacks: Any) -> list[dict[str, Any]]:
    """Callbacks as a list of classes and their options, however they were written."""
    found = [*callbacks] if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [{"class_path": one} if isinstance(one, str) else one for one in found]


def extended(callbacks: Any, added: Any) -> list[dict[str, Any]]:
    """A list with the callbacks of ``callbacks+``.

    One of a class that the list has already sets that one's options: two of a kind would save,
    prune and judge against each other.
    """
    found = listed(callbacks)
    for one in listed(added):
        same = [n for n, there in enumerate(found) if there["class_path"] == one["class_path"]]
        if same:
            before = found[same[-1]].get("init_args") or {}
            found[same[-1]] = {**one, "init_args": {**before, **(one.get("init_args") or {})}}
        else:
            found.append(one)
    return found


def set_callbacks(arguments: list[str], contents: Mapping[str, Any]) -> list[str]:
    """Sets options of single callbacks, which a parser that knows only the list does not.

    Args:
        arguments: a command line, experiments replaced by their files.
        contents: of these files, as they are named there.

    Returns:
        the command line without such options, and with the whole list, changed by them and by
        ``callbacks+`` of the files, behind what had set it.

    Raises:
        FewstepError: for a callback that is not in the list, or an option without a value.
    """
    rest, kept = list(arguments), list[str]()
    changes: dict[str, Any] = {}
    callbacks: Any = None
    place, is_new = 0, False
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
        trainer: Mapping[str, Any] = {}
        if token == "--config":
            trainer = (contents.get(kept[-1]) or {}).get("trainer") or {}
        elif whole:
            trainer = {"callbacks": _value(whole[1] or kept[-1])}
        if trainer.get("callbacks") is not None:
            callbacks, place, is_new = trainer["callbacks"], len(kept), False
        if trainer.get("callbacks+") is not None:
            callbacks, place, is_new = extended(callbacks, trainer["callbacks+"]), len(kept), True
    _refuse_small_letters(arguments, listed(callbacks))
    if not changes and not is_new:
        return kept
    changed = {"trainer": {"callbacks": with_callbacks(listed(callbacks), changes)}}
    return [*kept[:place], "--config", json.dumps(changed), *kept[place:]]


def _refuse_small_letters(arguments: list[str], callbacks: list[dict[str, Any]]) -> None:
    names = {class_name(one).lower(): class_name(one) for one in callbacks}
    for token in arguments:
        small = _SMALL.fullmatch(token)
        if small and small[1] in names:
            raise FewstepError(
                f"'{token}' sets no callback of this experiment. Did you mean "
                f"'{token.replace(f'.{small[1]}.', f'.{names[small[1]]}.', 1)}'?"
            )


def _value(text: str) -> Any:
    """What is meant by a value on the command line; YAML takes 1e-4 for a text."""
    found = yaml.safe_load(text)
    try:
        return float(found) if isinstance(found, str) and found[:1] in "+-.0123456789" else found
    except ValueError:
        return found

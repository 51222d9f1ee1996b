"""Turns a configuration parser's nested error into the one sentence that matters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from fewstep.errors import nearest
from fewstep.spec import arguments_of, find_class

_UNKNOWN = re.compile(r"(?:Option '([\w.]+)' is not accepted|not accept option '([\w.]+)')")
# What a factory (an optimiser, a backbone) was given, when the complaint is about one.
_FACTORY = re.compile(r"is not accepted\. Got value: Namespace\(.*?class_path='([\w.]+)'")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_REASON = re.compile(
    r"^( *(?:- )?)(.*(?:Expected a|has no attribute|No module named|a subclass|are required).*)$",
    re.M,
)
# What a parser says of each type it tried in vain.
_OTHER_TYPE = re.compile(r"- (?:Expected a |Does not validate against|Import path \S+ does not)")
# A plain type, and what was given instead of it, there or in a later line.
_PLAIN = re.compile(r"Expected a (?:<class '(int|float|bool)'>|typing\.Literal\[(.*?)\](?=\.|$))")
_GIVEN = re.compile(r"(?:Got|Given) value: (.*?)(?:\. Got value: .*)?$", re.M)
_MEANT = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_WHERE = re.compile(r"Parser key \"([\w.\[\]]+)\"")


def explain(message: str) -> str:
    """Returns a short message: which key or value is wrong, and the nearest right name."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        # The innermost class before the complaint is the one that does not know the key.
        owners = _CLASS.findall(message[: unknown.start()])
        owners += _FACTORY.findall(message[unknown.start() :].split("\n", maxsplit=1)[0])
        key = unknown.group(1) or unknown.group(2)
        if owners:
            known = list(_arguments_of(owners[-1]))
            return (
                f"The configuration has an unknown key '{key}' for {owners[-1]}."
                f"{nearest(key.split('.')[0], known)} Its options: {', '.join(known)}."
            )
        return f"The configuration has an unknown key '{key}'.{nearest(key, _top_level())}"
    places = ".".join(dict.fromkeys(_WHERE.findall(message)))
    reasons = [found for found in _REASON.findall(message) if "NoneType" not in found[1]]
    if reasons and places:
        # The innermost: those around it say that the value is none of another type's.
        _, reason = max(reasons, key=lambda found: len(found[0]))
        return f"The configuration's '{places}' {_in_words(reason, message)}"
    return message.strip().split("\n  Given value")[0]


def _in_words(reason: str, message: str) -> str:
    """What is wrong with a value, without the names that Python has for types."""
    plain = _PLAIN.search(reason)
    if plain is None and reason.rstrip().endswith("dot import path string: None"):
        return (
            "names a class, which a command line cannot take away again. Write it as null into a "
            "YAML file of your own, and give that by another -c."
        )
    if plain is None:
        return f"is wrong: {reason}"
    meant = _MEANT[plain[1]] if plain[1] else f"one of {plain[2]}".replace("'", "")
    given = _GIVEN.search(message, message.index(reason))
    return f"must be {meant}" + (f", not '{given[1]}'." if given else ".")


def reasons_within(message: str) -> str:
    """Why each of several types could not be built, without what only says that it was another's.

    Empty if the message is not of that kind.
    """
    if not message.startswith("Does not validate against any of the Union subtypes"):
        return ""
    said = (line.strip() for line in message.splitlines() if line.lstrip().startswith("- "))
    found = [line.removeprefix("- ") for line in said if not _OTHER_TYPE.search(line)]
    return "; ".join(dict.fromkeys(found))


def _arguments_of(class_path: str) -> Iterable[str]:
    """Names of all constructor arguments, those of base classes behind ``**kwargs`` included."""
    found = find_class(class_path)
    return {} if found is None else arguments_of(found)


def _top_level() -> list[str]:
    import lightning.pytorch as pl

    sections = ["model", "data", "trainer", "run", "seed_everything", "ckpt_path"]
    trainer = [f"trainer.{name}" for name in inspect.signature(pl.Trainer.__init__).parameters]
    parts = ["model.class_path", "model.init_args", "data.class_path", "data.init_args"]
    return [*sections, *trainer, *parts, "run.dir", "run.name", "run.version"]

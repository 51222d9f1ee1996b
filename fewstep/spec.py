"""Plain descriptions of networks and schedules, so that a checkpoint says how to rebuild them.

A description is ``{"class_path": ..., "init_args": {...}}`` with plain values only, the same form
an experiment YAML uses; it survives ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

from fewstep.errors import FewstepError

T = TypeVar("T")
Spec = dict[str, Any]


class Describable(Protocol):
    """Anything that keeps the plain arguments it was built from."""

    config: dict[str, Any]


class Change(ABC):
    """What was done to a thing after it was built, and is done again when it is rebuilt.

    A thing that was changed lists its changes, in order, as ``changes``.
    """

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""

    @abstractmethod
    def apply_to(self, thing: Any) -> None:
        """Changes a thing that was just built; its weights are loaded afterwards."""


def describe(thing: Describable | Change) -> Spec:
    """Returns the description from which :func:`build` makes an equal object."""
    # FSDP2 gives a sharded module a class of its own, below the one it was built from.
    cls = next(c for c in type(thing).__mro__ if not c.__module__.startswith("torch.distributed."))
    spec = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(thing.config)}
    changes = [describe(change) for change in getattr(thing, "changes", ())]
    return {**spec, "changes": changes} if changes else spec


def with_defaults(value: Any) -> Any:
    """Plain values whose descriptions state all arguments, those left out by their defaults.

    So a checkpoint from before a class had an option equals one that leaves it at its default.
    Classes that cannot be found stay as they are.
    """
    if isinstance(value, list):
        return [with_defaults(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: with_defaults(one) for name, one in value.items()}
    if isinstance(value.get("class_path"), str) and isinstance(value.get("init_args"), dict):
        found["init_args"] = {**defaults_of(value["class_path"]), **found["init_args"]}
    return found


def defaults_of(class_path: str) -> dict[str, Any]:
    """The plain defaults of a class's arguments, by name; empty for what cannot be found."""
    found = find_class(class_path)
    return {
        name: default
        for name, parameter in ({} if found is None else arguments_of(found)).items()
        if (default := _default(found, parameter)) is not inspect.Parameter.empty
    }


def default_at(class_path: str, path: Sequence[str]) -> Any:
    """The default of an argument, or of a field within arguments that are dataclasses.

    Args:
        class_path: of the class.
        path: the argument's name, and behind it those of fields within.

    Returns:
        The default; ``inspect.Parameter.empty`` if there is none, or nothing can be found.
    """
    found: Any = find_class(class_path)
    for name in path[:-1]:
        found = _dataclass_of(found, name)
    parameter = {} if found is None else arguments_of(found)
    if path[-1] not in parameter:
        return inspect.Parameter.empty
    return _default(found, parameter[path[-1]])


def arguments_of(made: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a class or function takes by name, what it hands on to base classes included."""
    bases = inspect.getmro(made) if isinstance(made, type) else (made,)
    found: dict[str, inspect.Parameter] = {}
    for base in bases:
        if isinstance(base, type) and "__init__" not in vars(base):
            continue
        if base is object:
            break
        try:
            parameters = list(inspect.signature(base).parameters.values())
        except (ValueError, TypeError):
            break
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found = {p.name: p for p in named} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def find_class(class_path: str) -> Any:
    """A class or function by its import path; None if it cannot be found."""
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError):
        return None


def _default(made: Any, parameter: inspect.Parameter) -> Any:
    """A default as a configuration has it: sequences are lists."""
    default = parameter.default
    if is_dataclass(made):
        factories = {f.name: f.default_factory for f in fields(made)}
        factory = factories.get(parameter.name, MISSING)
        default = default if factory is MISSING else factory()
    return list(default) if isinstance(default, tuple) else default


def _dataclass_of(made: Any, argument: str) -> Any:
    """The dataclass that an argument takes, if its type names one."""
    parameter = {} if made is None else arguments_of(made)
    if argument not in parameter:
        return None
    owner = next((b for b in inspect.getmro(made) if argument in _hints(b)), None)
    hint = _hints(owner).get(argument)
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def _hints(made: Any) -> dict[str, Any]:
    try:
        return {} if made is None else get_type_hints(made.__init__)
    except (NameError, TypeError, AttributeError):
        return {}


def build(spec: Spec, expected: type[T]) -> T:
    """Builds what ``spec`` describes.

    The class is checked *before* it is called: a checkpoint can name only subclasses of
    ``expected``, never an arbitrary callable.

    Raises:
        FewstepError: if the class cannot be found or is not an ``expected``.
    """
    module_name, _, name = spec["class_path"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise FewstepError(
            f"The checkpoint needs the class '{spec['class_path']}', which cannot be imported "
            f"({error}). Install the package or check out the version that defines it."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, expected)):
        raise FewstepError(
            f"The checkpoint names '{spec['class_path']}' where a {expected.__name__} belongs; "
            "it was not written by fewstep or has been altered."
        )
    built: T = cls(**spec["init_args"])
    for change in spec.get("changes", ()):
        build(change, Change).apply_to(built)  # type: ignore[type-abstract]
    return built

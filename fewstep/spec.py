"""Plain descriptions of networks and schedules, so that a checkpoint says how to rebuild them.

A description is ``{"class_path": ..., "init_args": {...}}`` with plain values only, the same form
an experiment YAML uses; it survives ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from abc import ABC, abstractmethod
from typing import Any, Protocol, TypeVar

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
    """The defaults of a class's arguments, those that it hands on to its bases included.

    Empty for what cannot be found.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError):
        return {}
    stated: dict[str, Any] = {}
    # The nearest one counts; bases are asked for what is handed on by **options.
    for known in reversed(inspect.getmro(found)[:-1] if isinstance(found, type) else [found]):
        with contextlib.suppress(ValueError, TypeError):
            parameters = inspect.signature(known).parameters.values()
            stated |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return stated


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

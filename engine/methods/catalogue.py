"""Which methods there are: every decorated function in this folder.

One file a method also for pairs that differ in how they join, as `della` and `della_linear` (2026-11-29): title and
source are the file's, defaults may differ, and what a pair shares is in `drop.py` and `trim.py`. What stands twice is
the signature, which is the contract that is read, not logic.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Protocol, TypeVar

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.coefficients import Coefficients
from mergemill.engine.methods.contract import Method
from mergemill.engine.methods.steps import Step

_FOLDER = [str(Path(__file__).parent)]


class Named(Protocol):
    """What a folder can be searched for."""

    @property
    def name(self) -> str:
        """The name in a recipe."""


N = TypeVar("N", bound=Named)


@functools.cache
def find_methods() -> Mapping[str, Method]:
    """Return the methods by name, in alphabetical order."""
    return _by_name(method for module in _import_all() for method in methods_of(module))


@functools.cache
def find_coefficients() -> Mapping[str, Coefficients]:
    """Return the coefficient methods by name, in alphabetical order."""
    return _by_name(found for module in _import_all() for found in _defined(module, "coefficients", Coefficients))


@functools.cache
def find_steps() -> Mapping[str, Step]:
    """Return the steps after a merge by name, in alphabetical order."""
    return _by_name(found for module in _import_all() for found in _defined(module, "step", Step))


def methods_of(module: ModuleType) -> Iterator[Method]:
    """Yield the methods that a module defines."""
    return _defined(module, "method", Method)


def get_method(name: str) -> Method:
    """Return the method called `name`; `PlanError` names the nearest one there is."""
    return _find_alone(name) or get_named(name, find_methods(), "merge_method")


@functools.cache
def _find_alone(name: str) -> Method | None:
    """Return the method that is in a file of its own name, without a look into all the others."""
    if name not in {found.name for found in pkgutil.iter_modules(_FOLDER)}:
        return None
    return next((method for method in methods_of(_import(name)) if method.name == name), None)


def get_coefficients(name: str) -> Coefficients:
    """Return the coefficient method called `name`; `PlanError` names the nearest one there is."""
    return get_named(name, find_coefficients(), "method of coefficients")


def get_step(name: str) -> Step:
    """Return the step called `name`; `PlanError` names the nearest one there is."""
    return get_named(name, find_steps(), "step after a merge")


def _import_all() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(_FOLDER):
        yield _import(found.name)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _defined(module: ModuleType, mark: str, kind: type[N]) -> Iterator[N]:
    """Yield what decorators of one kind left at functions that the module itself defines."""
    for value in vars(module).values():
        found = getattr(value, mark, None) if inspect.isfunction(value) else None
        if isinstance(found, kind) and value.__module__ == module.__name__:
            yield found


def _by_name(found: Iterator[N]) -> Mapping[str, N]:
    return MappingProxyType({value.name: value for value in sorted(found, key=lambda value: value.name)})


def get_named(name: str, known: Mapping[str, N], what: str) -> N:
    """Return what is called `name`; `PlanError` says `what` it should be, and the nearest one there is."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise PlanError(f"unknown {what} {name!r}; {hint}")

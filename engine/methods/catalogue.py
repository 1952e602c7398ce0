"""Which methods there are: every decorated function in this folder."""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType

from mergemill.engine import methods
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method


@functools.cache
def find_methods() -> Mapping[str, Method]:
    """Return the methods by name, in alphabetical order."""
    modules = (
        importlib.import_module(f"{methods.__name__}.{found.name}") for found in pkgutil.iter_modules(methods.__path__)
    )
    found = {method.name: method for module in modules for method in methods_of(module)}
    return MappingProxyType(dict(sorted(found.items())))


def methods_of(module: ModuleType) -> Iterator[Method]:
    """Yield the methods that a module defines."""
    for value in vars(module).values():
        method = getattr(value, "method", None)
        if isinstance(method, Method) and method.function.__module__ == module.__name__:
            yield method


def get_method(name: str) -> Method:
    """Return the method called `name`; `PlanError` names the nearest one there is."""
    known = find_methods()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise PlanError(f"unknown merge_method {name!r}; {hint}")

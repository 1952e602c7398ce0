"""One suite for all methods: the table of their entries, collected from the folder `entries`."""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import fields

from methods import entries
from methods.entry import Entry
from methods.harness import Settings, Task
from torch import Tensor

from mergemill.engine.conformance import Subject
from mergemill.engine.conformance.subject import TENSOR
from mergemill.engine.methods.catalogue import get_method

ENTRIES: dict[str, Entry] = {
    name: entry
    for found in pkgutil.iter_modules(entries.__path__)
    for name, entry in importlib.import_module(f"{entries.__name__}.{found.name}").ENTRIES.items()
}


def find_entry(name: str) -> Entry:
    """Return the method's entry; an AssertionError says to add one."""
    if name not in ENTRIES:
        raise AssertionError(
            f"merge method {name!r} is not in ENTRIES of tests/methods/entries; "
            f"add an entry: its settings, its oracle from tests/oracles, and which claims hold for it"
        )
    return ENTRIES[name]


def find_subject(name: str) -> Subject:
    """Return the method with what its entry claims, as the engine's suite takes it."""
    entry = find_entry(name)
    claimed = {field.name: getattr(entry, field.name) for field in fields(entry) if field.name != "everywhere"}
    return Subject(get_method(name), **claimed)


def make_task(
    name: str,
    values: Sequence[Tensor],
    given: Settings | None = None,
    *,
    tensor: str = TENSOR,
    seed: int = 7,
    models: tuple[int, ...] | None = None,
) -> Task:
    """Return a task over as many of `values` as the method takes: its base first, then its models."""
    return find_subject(name).make_task(values, given, tensor=tensor, seed=seed, models=models)

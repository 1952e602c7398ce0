"""One suite for all methods: the table of their entries, collected from the folder `entries`."""

import importlib
import pkgutil
from collections.abc import Sequence

from methods import entries
from methods.entry import Based, Entry
from methods.harness import Settings, Task, fill_settings
from torch import Tensor

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


def make_task(
    name: str,
    values: Sequence[Tensor],
    given: Settings | None = None,
    *,
    tensor: str = "model.layers.3.mlp.up_proj.weight",
    seed: int = 7,
    models: tuple[int, ...] | None = None,
) -> Task:
    """Return a task over as many of `values` as the method takes: its base first, then its models."""
    method, entry = get_method(name), find_entry(name)
    given = entry.variants[0] if given is None else given
    optional_base = method.base == "optional" and isinstance(given, Based)
    count = entry.models + int(optional_base or method.base == "required")
    inputs = tuple(values[:count])
    settings = fill_settings(method, given, entry.models)
    return Task(name, inputs, settings, tensor, seed, models, optional_base)

"""What a model calls the modules that an adapter names: another beginning, another spelling."""

import itertools
from collections.abc import Collection, Iterator, Mapping

from mergemill.engine.checkpoint.adapter import Adapter
from mergemill.engine.checkpoint.family import Family, spell
from mergemill.engine.checkpoint.packed_experts import find_parameter
from mergemill.engine.checkpoint.weights import StoredTensor


def find_spellings(names: Collection[str], family: Family) -> Mapping[str, str]:
    """Return the modules and tensors that a model spells otherwise, by the one spelling that stands for all.

    Not those of which it has one in that spelling as well: a router may be in another module than its experts.
    """
    found: dict[str, str] = {}
    for name in names:
        if spell(name, family) == name:
            continue
        for own in _list_paths(name):
            if (said := spell(f"{own}.", family)[:-1]) != own:
                found[said] = own
    both = {path for name in names for path in _list_paths(name)} if found else set()
    return {said: own for said, own in found.items() if said not in both}


def _list_paths(name: str) -> Iterator[str]:
    """Yield a tensor's name and those of all modules that it is in.

    >>> list(_list_paths("h.0.weight"))
    ['h', 'h.0', 'h.0.weight']
    """
    yield from itertools.accumulate(name.split("."), "{}.{}".format)


def find_prefixes(adapter: Adapter, names: Collection[str]) -> tuple[str, str]:
    """Return what the adapter's names begin with where the model's begin with another: a model may be stored without
    its head, and an adapter trained with one (``transformer.h.0`` for ``h.0``), or the reverse.

    All that the adapter names must be there; where no beginning does it, none is assumed.
    """
    by_weight = {module: parts for module, parts in adapter.parts.items() if find_parameter(adapter, module) is None}
    wanted = [*adapter.whole, *(_weigh(module, parts) for module, parts in by_weight.items())]
    known = frozenset(names)
    if not wanted or all(name in known for name in wanted):
        return "", ""
    roots = ["", *sorted({root for name in names for root in _roots(name)})]
    for cut in ["", *_roots(wanted[0])]:
        if not all(name.startswith(cut) for name in wanted):
            continue
        for root in roots:
            if all(root + name.removeprefix(cut) in known for name in wanted):
                return cut, root
    return "", ""


def _weigh(module: str, parts: Mapping[str, StoredTensor]) -> str:
    return f"{module}.{'bias' if list(parts) == ['bias'] else 'weight'}"


def _roots(name: str) -> tuple[str, ...]:
    """Return the first one and the first two components of a name, each with its dot.

    >>> _roots("model.language_model.norm.weight")
    ('model.', 'model.language_model.')
    """
    parts = name.split(".")[:-2]
    return tuple(".".join(parts[:count]) + "." for count in (1, 2) if count <= len(parts))

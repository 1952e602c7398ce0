"""What predicts later tokens (MTP): stored after the layers that the config counts, or under a name of its own.

It is no layer of the stack. Loaders of transformers leave it out; those that draft tokens with it ask the config.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mergemill.engine.checkpoint.config import LATER_LAYERS, Changes, find_layer_count
from mergemill.engine.checkpoint.family import Family, match_later, split_layer


def list_later(names: Iterable[str], config: Mapping[str, Any], family: Family) -> frozenset[str]:
    """Return the names of a model's tensors that predict later tokens."""
    return list_named_later(names, family) | list_layers_beyond(names, config, family)


def list_named_later(names: Iterable[str], family: Family) -> frozenset[str]:
    """Return those that a name of its own tells."""
    return frozenset(filter(match_later(family), names))


def list_layers_beyond(names: Iterable[str], config: Mapping[str, Any], family: Family) -> frozenset[str]:
    """Return those in layers after the last that the config counts, where it says that there are such."""
    if not _predicts(config):
        return frozenset()
    counts: dict[str, int] = {}
    found = []
    for name in names:
        split = split_layer(name)
        if split is None:
            continue
        if split[0] not in counts:
            count = find_layer_count(config, family, split[0])
            counts[split[0]] = 0 if count is None else count.count
        if split[1] >= counts[split[0]] > 0:
            found.append(name)
    return frozenset(found)


def later_changes(config: Mapping[str, Any]) -> Changes:
    """Return what changes where nothing predicts later tokens any more."""
    return {(*place, key): 0 for place, part in _list_parts(config) for key in LATER_LAYERS if part.get(key)}


def _predicts(config: Mapping[str, Any]) -> bool:
    return any(part.get(key) for _, part in _list_parts(config) for key in LATER_LAYERS)


def _list_parts(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    inner = config.get("text_config")
    return [((), config), *([(("text_config",), inner)] if isinstance(inner, Mapping) else [])]

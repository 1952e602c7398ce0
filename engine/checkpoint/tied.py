"""Tied tensors that a file has under two names and once: as in safetensors, which has no two names for one place.

``torch.save`` writes a storage once and every name that shares it; transformers leaves the second name out of
safetensors where it ties the two anyway. So a model is the same, whichever of the two it is stored in.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.family import choose_family, find_ties
from mergemill.engine.checkpoint.weights import StoredTensor


def join_ties(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Mapping[str, StoredTensor]:
    """Return the tensors without those at whose place lies the one that loaders take for them."""
    if len({(each.file.url, each.offset_bytes) for each in tensors.values()}) == len(tensors):
        return tensors  # as all safetensors do: none lies in the place of another
    places: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, each in tensors.items():
        places[each.file, each.offset_bytes, each.dtype, each.shape, each.axes].append(name)
    shared = {name: names for names in places.values() if len(names) > 1 for name in names if tensors[name].nbytes}
    if not shared or says_tied(config) is False:
        return tensors
    ties = find_ties(shared, tensors, choose_family(config))
    return {name: each for name, each in tensors.items() if ties.get(name) not in shared.get(name, ())}

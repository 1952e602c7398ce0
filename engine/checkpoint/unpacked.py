"""Packed experts as tensors of their own, for adapters whose modules are the experts one by one.

Such adapters are trained on the Hub's layout, and the base may be stored in the other. An expert is then a range of
what is stored, which the adapter changes like any tensor; at the end the experts are packed as they were.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergemill.engine.checkpoint.adapter import Adapter
from mergemill.engine.checkpoint.changes import Packed, Residual
from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, is_packed_otherwise
from mergemill.engine.checkpoint.packed_experts import name_experts
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import CheckpointError

_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
_PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A model whose packed experts are tensors of their own, and what they were."""

    model: Checkpoint
    packed: Mapping[str, StoredTensor]
    parts: Mapping[str, Mapping[str, StoredTensor]]  # of each, by its name


def unpack_experts(model: Checkpoint, adapters: Sequence[Adapter], family: Family) -> Unpacked:
    """Return the model with packed experts one by one, where an adapter is of such; else as it is."""
    if not any(_ONE_EXPERT.search(f"{module}.") for adapter in adapters for module in adapter.parts):
        return Unpacked(model, {}, {})
    parts = {name: dict(_take_apart(stored, family)) for name, stored in model.tensors.items()}
    parts = {name: of for name, of in parts.items() if of}
    tensors = {name: stored for name, stored in model.tensors.items() if name not in parts}
    for of in parts.values():
        tensors |= of
    return Unpacked(replace(model, tensors=tensors), {name: model.tensors[name] for name in parts}, parts)


def pack_again(changed: Checkpoint, unpacked: Unpacked, ref: str) -> Checkpoint:
    """Return the model with its experts packed as they were: those that were changed by a last change of all."""
    touched = {change.tensor for change in changed.changes}
    tensors, changes = dict(changed.tensors), list(changed.changes)
    for name, parts in unpacked.parts.items():
        if any(part in touched or tensors[part] is not stored for part, stored in parts.items()):
            changes.append(Packed(name, tuple(parts), unpacked.packed[name].shape))
            continue
        for part in parts:
            del tensors[part]
        tensors[name] = unpacked.packed[name]
    packed = {part for change in changes if isinstance(change, Packed) for part in change.parts}
    begun = next((each.tensor for each in changes if isinstance(each, Residual) and each.tensor in packed), None)
    if begun is not None:
        raise CheckpointError(
            f"{ref}: the adapter was begun inside {begun}, and the base packs its experts; take the base as it is "
            f"stored one by one, or save the adapter as plain LoRA"
        )
    return replace(changed, tensors=tensors, changes=tuple(changes))


def _take_apart(stored: StoredTensor, family: Family) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the experts of a packed tensor by their names; nothing of any other tensor."""
    if stored.axes is not None or stored.dtype not in _PLAIN or is_packed_otherwise(stored.name, family):
        return
    offset_bytes = stored.offset_bytes
    for name, shape in name_experts(stored.name, stored.shape, family).items():
        part = stored._replace(name=name, shape=shape, offset_bytes=offset_bytes)
        yield name, part
        offset_bytes += stored.nbytes * math.prod(shape) // math.prod(stored.shape)

"""A draft: what a planner makes, and the one function that finishes it to a plan.

A merge, and every tool that builds a model, is a planner: a function that looks at headers and returns a draft. What
all plans have in common is done here: names of shards, their layout, the file that is written last, the digest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from mergemill.engine.checkpoint.index import INDEX_NAME
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.digest import make_digest
from mergemill.engine.plan.index import make_index
from mergemill.engine.plan.layout import LayOut, make_layout, number_shard
from mergemill.engine.plan.names import check_lengths, warn_of_twins
from mergemill.engine.plan.sizes import read_shard_size
from mergemill.engine.plan.steps import Scaling
from mergemill.engine.plan.values import (
    Beforehand,
    Origin,
    OutputTensor,
    OutputTokens,
    Part,
    Plan,
    Shard,
    SmallFile,
    SourceUse,
)
from mergemill.engine.recipe import Guard
from mergemill.engine.storage.ranges import Pin, is_remote
from mergemill.engine.tensors.slabs import Span

SHARD_SIZE = "5GB"
_NOTHING = Span(0, 0)

Seal = Callable[[Sequence[Shard], Sequence[OutputTensor]], SmallFile]
Indices = Callable[[Sequence[Shard], Sequence[OutputTensor]], Sequence[SmallFile]]


def seal_with_index(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> SmallFile:
    """Return the index: without it no loader takes several shards for a model."""
    return SmallFile(INDEX_NAME, make_index(shards, tensors).encode(), None)


def no_indices(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> Sequence[SmallFile]:
    """Return none: the seal is the only index."""
    return ()


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be written, before it is laid out."""

    origin: Origin
    tensors: Sequence[OutputTensor]  # in the order of the model
    files: Sequence[SmallFile]  # beside the shards, in the order in which they are written, without the seal
    sources: Sequence[SourceUse]
    donor: str  # whose config and tokenizer the output has, and why
    dtype_from: str = ""  # why the tensors have their dtypes
    guard: Guard = field(default_factory=Guard)
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options that the origin gives
    scaling: Scaling | None = None
    warnings: Sequence[str] = ()
    tokens: OutputTokens | None = None
    gates: Beforehand | None = None  # what routers are computed from
    indices: Indices = no_indices  # makes those of folders in the output
    seal: Seal = seal_with_index  # makes the file that is written last, and makes an output of what is there
    name_shard: Callable[[int, int], str] = number_shard  # of its place, from 0, and how many there are
    lay_out: LayOut = make_layout  # says which tensor lies where


def finish(draft: Draft, shard_size: str | int) -> Plan:
    """Return the plan of a draft; shard_size: the most bytes of a shard, or ``"tensor"``."""
    size, read_as = read_shard_size(shard_size)
    pins = _list_pins(draft)
    remote = any(is_remote(pin.url) for pin in pins)
    shards, parts = draft.lay_out(draft.tensors, size, draft.name_shard, remote)
    if draft.scaling is not None:
        _check_norms(draft.scaling, parts)
    files = (*draft.files, *draft.indices(shards, draft.tensors), draft.seal(shards, draft.tensors))
    names = [shard.name for shard in shards] + [file.name for file in files]
    check_lengths(names)
    return Plan(
        digest=make_digest(draft.origin, draft.tensors, shards, parts, files),
        origin=draft.origin,
        shard_size=str(size),
        shards=shards,
        parts=parts,
        files=files,
        sources=tuple(draft.sources),
        pins=pins,
        donor=draft.donor,
        dtype_from=draft.dtype_from,
        guard=draft.guard,
        storage=draft.storage,
        scaling=draft.scaling,
        gates=draft.gates,
        warnings=(*([read_as] if read_as else ()), *draft.warnings, *warn_of_twins(names)),
        tokens=draft.tokens,
    )


def _check_norms(scaling: Scaling, parts: Sequence[Part]) -> None:
    """Raise `PlanError` where norms are asked of what a part cannot know: its share of a tensor that is cut.

    An input that needs all of its tensor first, as a merge by slerp does, is known to a part that has all of it.
    """
    for piece in (piece for part in parts for piece in part.pieces if not piece.whole):
        if any(each.count_rounds()[1] for each in piece.tensor.expression.inputs):
            raise PlanError(
                f"tensor {piece.tensor.name}: {scaling.method.name} needs the norms of its task vectors, and one of "
                f"its inputs is itself made from statistics of the whole tensor, which is too large for one part; "
                f"merge that input into a model first"
            )


def _list_pins(draft: Draft) -> tuple[Pin, ...]:
    """Return every file that the tensors and their gates read, in order."""
    expressions = [tensor.expression for tensor in draft.tensors]
    read = chain.from_iterable(each.iter_pins() for each in expressions)
    held = (each.pin for each in chain.from_iterable(each.holds(_NOTHING) for each in expressions))
    # Many tensors read few files: a pin is looked at by its identity before its fields are.
    found = set({id(pin): pin for pin in chain(read, held)}.values())
    if draft.gates is not None:
        found.update(draft.gates.pins)
    return tuple(sorted(found, key=lambda pin: pin.url))

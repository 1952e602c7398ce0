"""Sums over a comparison: by kind of tensor, by layer, and which tensors changed most."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mergemill.engine.checkpoint.tensor_kinds import KINDS
from mergemill.engine.runs.differences import Diff, TensorDiff


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What changed of some tensors together, on one side of a comparison."""

    tensors: int
    identical: int  # of them, byte by byte: first and second
    relative: float | None  # norm of all differences over that of what they are taken from; None where that is 0
    unchanged: float  # share of elements
    rank: float | None  # mean effective rank of matrices that changed
    cosine: float | None  # mean, by elements


def sum_up(tensors: Sequence[TensorDiff], side: int) -> GroupChange:
    """Return what changed of tensors together."""
    numbers = [each for each in tensors if side < len(each.deltas)]
    deltas = [each.deltas[side] for each in numbers]
    size = sum(math.prod(each.shape) for each in numbers)
    own = math.hypot(*(each.own for each in deltas))
    ranks = [each.rank for each in deltas if each.rank is not None]
    told = [(each.cosine, math.prod(each.shape)) for each in numbers if each.cosine is not None]
    weights = sum(weight for _, weight in told)
    return GroupChange(
        len(tensors),
        sum(each.identical for each in tensors),
        math.hypot(*(each.norm for each in deltas)) / own if own else None,
        sum(each.deltas[side].unchanged * math.prod(each.shape) for each in numbers) / size if size else 1.0,
        sum(ranks) / len(ranks) if ranks else None,
        sum(cosine * weight for cosine, weight in told) / weights if weights else None,
    )


def group_by_kind(diff: Diff) -> dict[str, list[TensorDiff]]:
    """Return the tensors of each kind, in the order of `KINDS`."""
    found = _group(diff.tensors, lambda each: each.kind)
    return {kind: found[kind] for kind in KINDS if kind in found}


def group_by_layer(tensors: Iterable[TensorDiff], stack: str) -> dict[tuple[int, str], list[TensorDiff]]:
    """Return the tensors of each layer and kind of a stack."""
    inside = sorted((each for each in tensors if each.stack == stack and each.layer is not None), key=_place)
    return {key: list(found) for key, found in groupby(inside, _place)}


def list_stacks(diff: Diff) -> list[str]:
    """Return the stacks of layers, the largest first."""
    found = _group([each for each in diff.tensors if each.layer is not None], lambda each: each.stack)
    return sorted(found, key=lambda stack: (-len(found[stack]), stack))


def list_most_changed(diff: Diff, most: int) -> list[TensorDiff]:
    """Return the tensors that changed most for their size, on any side; what is not finite first."""
    return sorted((each for each in diff.tensors if _find_change(each)), key=lambda each: -_find_change(each))[:most]


def _find_change(tensor: TensorDiff) -> float:
    found = [each.norm if each.relative is None else each.relative for each in tensor.deltas]
    return max((math.inf if math.isnan(each) else each for each in found), default=0.0)


def _place(tensor: TensorDiff) -> tuple[int, str]:
    return tensor.layer or 0, tensor.kind


def _group(tensors: Iterable[TensorDiff], find: Callable[[TensorDiff], str]) -> dict[str, list[TensorDiff]]:
    groups: dict[str, list[TensorDiff]] = {}
    for each in tensors:
        groups.setdefault(find(each), []).append(each)
    return groups

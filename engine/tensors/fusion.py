"""How a merge method's slab is made in one go from what is stored: the part of a method that native loops understand.

A method that can says so with a function that returns a `Fusion` (see `merge_method`). Its body stays the definition:
it merges what the loops do not know (float64, tensors in memory, steps), with the same bits.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mergemill.engine.tensors.cut import Cut

JoinKind = Literal[
    "sum", "add", "agree", "share", "changed", "balance", "exceed", "farthest", "consent", "largest", "near", "turns",
    "lines"
]  # fmt: skip
Limits = np.ndarray[Any, np.dtype[np.int32]]
Weights = np.ndarray[Any, np.dtype[np.float32]]  # [tensors, columns], or [tensors, rows]
Divergences = np.ndarray[Any, np.dtype[np.float64]]
FUSED_ELEMENTS = 1024  # that native loops take at once: CHUNK of native.h
SPREAD = -1  # in place of a tensor's number: the standard deviation over all of them
IMPORTANCE = -2  # and this: how far the second lies from the first, times the divergence of their rows


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept of one task vector; the rest is multiplied by 0. One of the fields at most, and the factor."""

    factor: float = 1.0  # on what is kept
    nothing: bool = False  # all of it becomes 0
    cut: Cut | None = None  # of its magnitudes
    outliers: Cut | None = None  # but not these, the largest of the cut
    limit: int | None = None  # the elements whose random number, an int32, is under it
    ranks: tuple[int, ...] = ()  # of a slab that is a whole tensor, in place of cut and outliers: see `Trim`
    limits: Limits | None = None  # the same, by the rank of the magnitude in its row; they only rise, or only fall


@dataclass(frozen=True, slots=True)
class Scores:
    """What the scores of elements among task vectors hang on: of each, the least magnitude and what is above it."""

    least: tuple[float, ...]
    span: tuple[float, ...]  # to the largest; what is not above 0, or not finite, leaves nothing to compare by


@dataclass(frozen=True, slots=True)
class Importances:
    """What the importances of elements hang on."""

    divergences: Divergences  # of each row of the whole tensor
    columns: int


Derived = Scores | Importances


@dataclass(frozen=True, slots=True)
class Join:
    """How the tensors of a slab become one.

    "sum": ``sum(weight[i] · x[i])``, over `divisor` where that is not 0; "add": base + lambda · that.
    "agree": base + lambda · the sum over the weighted tensors of the elected sign, with `normalize` over their weights.
    "share": the same of the plain tensors, each with its weight as share, over the sum of those that agree.
    "changed": base + the mean of what is above the threshold; what one tensor alone has of that times its weight + 1.
    "balance": base + lambda · the mean of the tensors by their shares: how far the score of what is kept is on the way
    from the cut's threshold to so much above it as the weight is; 1, where that is 0.
    "farthest": base + lambda · the largest magnitude among the tensors of the sum's sign, with that sign; of none, 0.
    "consent": base + lambda · what "sum" makes, where all tensors have one sign.
    "largest": base + lambda · the tensor of largest magnitude, of equals the later.
    "near": base + lambda · the one tensor times the threshold over its magnitude, from 0 to 1.
    "turns": base + lambda · ``sum(weight[i] · kept[i])``: one tensor after the other keeps the `kept` largest of
    every `group` of elements that none before it has kept; whole groups make up what loops take at once.
    "lines": base + the tensors, each column of each, or with `by_row` each row, times its own weight.
    "exceed": the first of two tensors, and the second where its importance reaches the threshold.
    With `masks`, "add" and "agree" add only what at least `votes` tensors agree on (see `methods/consensus.py`).
    """

    kind: JoinKind
    weight: tuple[float, ...]
    divisor: float = 0.0
    lambda_: float = 1.0
    normalize: bool = False
    threshold: float = 0.0
    masks: tuple[float, ...] = ()
    votes: int = 0
    group: int = 0
    kept: int = 0
    lines: Weights | None = None
    columns: int = 0  # of the whole matrix
    by_row: bool = False


@dataclass(frozen=True, slots=True)
class Fusion:
    """A method with all that it knows of one tensor: what is kept of each input, and how these are joined."""

    join: Join
    keeps: tuple[Keep, ...] = ()  # of each input; none: all of all
    marked: Cut | None = None  # of all inputs: the elements where the models spread most, instead of `keeps`
    derived: Derived | None = None  # what scores and importances hang on

    def with_base(self, has_base: bool) -> "Fusion":
        """Return the fusion of a method that takes a base or none: a sum of task vectors is added to the base."""
        return replace(self, join=replace(self.join, kind="add")) if has_base and self.join.kind == "sum" else self

    @property
    def is_alone(self) -> bool:
        """Whether something is made of the slab for it: then it is not merged in one call with others."""
        ranked = self.marked is not None or self.derived is not None
        return ranked or any(keep.limits is not None for keep in self.keeps)

    @property
    def is_keyed(self) -> bool:
        """Whether the same fusion gives another tensor other random numbers."""
        return any(keep.limit is not None for keep in self.keeps)

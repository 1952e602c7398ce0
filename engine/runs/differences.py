"""How two models differ, as values: tensor by tensor, and in a few lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.plan.show import Facts, list_names, show_html, show_text
from mergemill.engine.plan.sizes import format_size


@dataclass(frozen=True, slots=True)
class Delta:
    """What a tensor of one model is more than that of another."""

    model: str
    less: str  # the other model
    norm: float  # of the difference
    own: float  # the norm of the other's
    relative: float | None  # of both; None where the other's is 0
    unchanged: float  # the share of elements that are equal: how sparse the difference is
    identical: bool  # byte by byte, with one dtype
    largest: float  # magnitude of the difference
    rank: float | None  # effective, (Σσ²)² / Σσ⁴, from a sketch; None where it is no matrix, or nothing changed
    histogram: tuple[int, ...]  # sampled elements of the difference, by powers of 2 from 2^-48 on
    experts: tuple[float | None, ...]  # of a router, each expert's relative change


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How one tensor differs."""

    name: str
    kind: str
    stack: str  # of its layer; empty outside the layers
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # in the order of the models
    deltas: tuple[Delta, ...]  # second less first; with a base each of both less it; none where it holds no numbers
    identical: bool  # first and second, byte by byte
    cosine: float | None  # of first and second; with a base of their differences to it
    signs: float | None  # the share of elements of one sign in both, of those that are 0 in neither


@dataclass(frozen=True, slots=True)
class Diff:
    """How two models differ."""

    models: tuple[str, ...]  # first, second, and the base where there is one
    tensors: tuple[TensorDiff, ...]  # that all have, with one shape
    only: Mapping[str, tuple[str, ...]]  # tensors that another lacks, by model
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]  # those that differ, by tensor
    why_not: tuple[str, ...]  # the models cannot be merged as they are, or that would mean little
    read_bytes: int
    seconds: float

    def __repr__(self) -> str:
        return show_text(*self._show())

    def _repr_html_(self) -> str:
        return show_html(*self._show())

    def _show(self) -> tuple[str, Facts]:
        second, *base = self.models[1:]
        beside = f" and {second}, each beside {base[0]}" if base else f", beside {second}"
        identical = sum(each.identical for each in self.tensors)
        lone = sum(map(len, self.only.values()))
        return f"Diff: {self.models[0]}{beside}", (
            ("tensors", f"{len(self.tensors):,} in all, {identical:,} of them identical"),
            ("lone", f"{lone:,} that another lacks, {len(self.shapes):,} of other shapes"),
            ("changed", list_names(list(_list_changes(self.tensors))) or "nothing"),
            ("in the way", list_names(self.why_not) or "nothing"),
            ("read", f"{format_size(self.read_bytes)} in {self.seconds:.1f} s"),
        )


def _list_changes(tensors: Sequence[TensorDiff]) -> Iterator[str]:
    """Yield the largest relative change of each tensor that has one, the largest first."""
    found = {each.name: max((side.relative or 0.0 for side in each.deltas), default=0.0) for each in tensors}
    ranked = {name: math.inf if math.isnan(change) else change for name, change in found.items() if change}
    for name in sorted(ranked, key=lambda name: -ranked[name]):
        yield f"{name} {found[name]:.3%}" if math.isfinite(found[name]) else f"{name} not finite"

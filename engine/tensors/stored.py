"""Slabs as they are stored, and the loops of ``stored.c`` over them: no element is decoded to memory.

The loops know float32, bfloat16 and float16; a slab's tensors are taken less their base, where there is one.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergemill.engine.tensors import native, structures
from mergemill.engine.tensors.cut import Cut, Ranked
from mergemill.engine.tensors.exact import ExactSum, Extremes, count_cuts, sum_lanes
from mergemill.engine.tensors.fusion import SPREAD, Derived, Divergences, Fusion, Join, Keep, Limits, Scores
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import Keys, find_keys
from mergemill.engine.tensors.workspace import Arena, Workspace

STORED_DTYPES = {"F32": 0, "BF16": 1, "F16": 2}
CODED = "codes"  # no dtype: a slab's bytes are then a `structures.NativeCoded`, of which loops decode what they need
ADAPTED = "adapted"  # nor is this: a `structures.NativeAdapted`, a weight in any of these forms and two factors
LOWERED = {**STORED_DTYPES, CODED: 3, ADAPTED: 4}
_KINDS = {"all": 0, "nothing": 1, "cut": 2, "random": 3, "mask": 4, "rank": 5}
_JOINS = {
    "sum": 0,
    "add": 1,
    "agree": 2,
    "share": 3,
    "changed": 4,
    "balance": 5,
    "exceed": 6,
    "farthest": 7,
    "consent": 8,
    "largest": 9,
    "near": 10,
    "turns": 11,
    "lines": 12,
}
MOST_NEAR = 1 << 18  # keys that a window of a slab has room for
_CHUNK = 1024  # elements, as native.h has it
_NO_MEMORY = -1  # what loops return; less, where they refuse what they were given
_NO_CUT = Cut(0.0, 0, 0, 0, 0)

Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class NearKeys:
    """Keys of one slab in the order of their elements, with how many of them each of its blocks has."""

    first_block: int  # of the slab, in the tensor
    counts: Counts
    keys: np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StoredSlab:
    """One slab of every input, as bytes; `work` lends room for masks."""

    arrays: tuple[Arena, ...]  # the base first, where there is one
    dtypes: tuple[str, ...]
    has_base: bool
    vectors: tuple[bool, ...]  # whether each tensor beside the base is less a base already
    scales: tuple[float, ...]  # on each tensor beside the base; none: all 1
    place: Place  # of the slab's first element
    size: int
    work: Workspace
    owner: int = 0  # of what is noted for later passes; merges inside one another note apart
    derived: Derived | None = None  # what scores and importances hang on, where these are asked for

    @property
    def count(self) -> int:
        """The number of tensors beside the base."""
        return len(self.arrays) - self.has_base

    def merge(self, fusion: Fusion, dtype: str, squares: native.Sums | None) -> tuple[Arena, int]:
        """Return the merged slab as `dtype`, as bytes, and how many of its values are not finite.

        `squares`, unless None, is filled as a `Watch` wants it: a row for the base, each tensor and the result.
        """
        encoded, (broken,) = merge_slabs([self], [fusion], dtype, None if squares is None else squares[None])
        return encoded, broken

    def sum_products(self) -> tuple[ExactSum, ...]:
        """Return the inner product of each tensor i with each j <= i, in this order."""
        pairs, cuts = self.count * (self.count + 1) // 2, self._cuts
        sums = np.empty((pairs, cuts, native.LANES))
        call_checked("stored_products", self.lowered, sums.ctypes.data, cuts)
        return tuple(sum_lanes(of_pair) for of_pair in sums)

    def sum_absolute(self, which: int, keep: Keep) -> tuple[ExactSum, ExactSum]:
        """Return the L1 norm of one tensor, and of what is kept of it."""
        sums = np.empty((2, self._cuts, native.LANES))
        if keep.limits is not None:
            self._mark_rows(which, keep.limits, sums)
        else:
            lowered, alive = self._lower_keep(which, keep)
            pointers = (sums[0].ctypes.data, sums[1].ctypes.data)
            call_checked("stored_norms", self.lowered, which, ctypes.byref(lowered), *pointers)
            del alive
        return sum_lanes(sums[0]), sum_lanes(sums[1])

    def sum_marked_squares(self, marked: Cut | None) -> tuple[ExactSum, ...]:
        """Return the sum of squares of each tensor over the marked elements of the spread; None marks all."""
        sums = np.empty((self.count, self._cuts, native.LANES))
        if marked is None:
            call_checked("stored_marked_squares", self.lowered, None, None, None, sums.ctypes.data, self._cuts)
        else:
            mask, bits = self.work.take_bytes(self.size), self._make_bits()
            pointers = (mask.ctypes.data, bits.ctypes.data, sums.ctypes.data)
            call_checked("stored_marked_squares", self.lowered, ctypes.byref(_lower_cut(marked)), *pointers, self._cuts)
            self.work.note(self._note_key(marked), bits)
        return tuple(sum_lanes(of_one) for of_one in sums)

    def count_changes(self, epsilon: float) -> tuple[tuple[int, int], ...]:
        """Return for each tensor how many changed elements it shares with others, and how many it has alone."""
        counts = np.zeros((self.count, 2), np.int64)
        call_checked("stored_changes", self.lowered, epsilon, counts.ctypes.data)
        return tuple((shared, alone) for shared, alone in counts.tolist())

    def find_extremes(self) -> tuple[Extremes, ...]:
        """Return the least and the largest magnitude of each tensor."""
        extremes = np.empty((self.count, 2))
        call_checked("stored_extremes", self.lowered, extremes.ctypes.data)
        return tuple(Extremes(least, most) for least, most in extremes.tolist())

    def find_base_extremes(self) -> Extremes:
        """Return the least and the largest magnitude of the base."""
        base = replace(
            self, arrays=self.arrays[:1], dtypes=self.dtypes[:1], has_base=False, vectors=(False,), scales=()
        )
        return base.find_extremes()[0]

    def sum_columns(self, unit: float, digits: Counts) -> None:
        """Add to `digits` ``[2·tensors + 1, 3, columns]`` sums over rows, over the unit's square; see ``columns.c``."""
        call_checked("stored_columns", self.lowered, digits.shape[2], 1 / unit, digits.ctypes.data)

    def sum_rows(self, unit: float, columns: int, sums: native.Sums) -> None:
        """Write the sums of the slab's rows to their places in `sums` ``[2·tensors + 1, rows]``."""
        call_checked("stored_row_squares", self.lowered, columns, 1 / unit, sums.shape[1], sums.ctypes.data)

    def find_divergences(self, columns: int) -> Divergences:
        """Return the divergence of the second tensor's rows from the first's."""
        divergences = np.empty(self.size // columns)
        call_checked("stored_divergences", self.lowered, columns, divergences.ctypes.data)
        return divergences

    def compare(
        self,
        alike: int,
        counts: Counts,
        columns: int,
        fourths: native.Sums,
        squares: native.Sums,
        sketch: native.Floats,
    ) -> native.Sums:
        """Return sums ``[4, cut]`` of two tensors, and add to the rest: see `comparing.py`."""
        cuts = self._cuts
        sums = np.empty((4, cuts))
        rows, sketches = (each.ctypes.data if each.size else None for each in (squares, sketch))
        pointers = (sums.ctypes.data, counts.ctypes.data, columns, fourths.ctypes.data, rows, sketches)
        call_checked("stored_compared", self.lowered, alike, cuts, *pointers)
        return sums

    def sample(self, which: int, first: int, stride: int, run: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Return the magnitudes' bits of `run` elements from `first` on, and every `stride` after: ``[n, run]``."""
        out = np.empty((max(0, (self.size - first - run) // stride + 1), run), np.uint32)
        call_checked("stored_sample", self.lowered, which, first, stride, run, out.ctypes.data)
        return out

    def count_windows(
        self, windows: Sequence[tuple[int, int, int]], ends: Sequence[Counts]
    ) -> list[tuple[int, int, NearKeys | None]]:
        """Look at windows of magnitudes' bits, each given by a tensor's number (or the spread's) and its two ends.

        Returns how many are above and how many between the ends, and these, unless there is no room for them. Adds to
        each of `ends` what equals the low and the high end, in each block of the whole tensor.
        """
        first, blocks = self.place.start // self.place.block, -(-self.size // self.place.block)
        room = min(self.size, MOST_NEAR)
        counts = np.zeros((len(windows), blocks), np.int64)
        keys = self.work.take_bytes(4 * room * len(windows)).view(np.uint32).reshape(-1, room)
        lowered = (structures.NativeWindow * len(windows))()
        for each, window, end, count, near in zip(lowered, windows, ends, counts, keys, strict=True):
            each.which, each.low, each.high = window
            each.low_counts, each.high_counts = (side[first:].ctypes.data for side in end)
            each.counts, each.keys, each.room = count.ctypes.data, near.ctypes.data, room
        call_checked("stored_windows", self.lowered, lowered, len(windows))
        near_keys = [
            NearKeys(first, count, near[: each.inside].copy()) if each.inside <= room else None
            for each, count, near in zip(lowered, counts, keys, strict=True)
        ]
        return [(each.above, each.inside, near) for each, near in zip(lowered, near_keys, strict=True)]

    def find_ranks(self, wanted: Sequence[tuple[int, int, float]]) -> list[Ranked | None]:
        """Find ranks in a slab that is the whole tensor, each given by a tensor's number (or what is derived), and m.

        In place of 0 as m, so large a share of what is not 0, rounded down; None where that is none. The ranks of one
        tensor lie side by side.
        """
        if not wanted:
            return []
        ranks = (structures.NativeRank * len(wanted))(*(structures.NativeRank(*each) for each in wanted))
        room = (len({which for which, _, _ in wanted}) + 1) * -(-self.size // _CHUNK) * _CHUNK
        keys = self.work.take_bytes(4 * room)
        call_checked("stored_ranks", self.lowered, ranks, len(ranks), keys.ctypes.data, room)
        return [Ranked(r.key, r.above, r.ties, r.block, r.block_ties) if r.rank else None for r in ranks]

    def count_upper(self, which: Sequence[int], counts: Sequence[Counts]) -> None:
        """Add to each of `counts` the upper 15 bits of the magnitudes of one tensor, or of the spread."""
        numbers = (ctypes.c_int64 * len(which))(*which)
        pointers = (ctypes.c_void_p * len(which))(*(of_one.ctypes.data for of_one in counts))
        call_checked("stored_upper", self.lowered, numbers, pointers, len(which))

    def count_lower(self, which: int, prefix: int, counts: Counts) -> None:
        """Add to `counts` the lower 16 bits of those whose upper 15 are `prefix`."""
        call_checked("stored_lower", self.lowered, which, prefix, counts.ctypes.data)

    def count_equal(self, which: int, value: float, counts: Counts) -> None:
        """Add to `counts`, one for each block of the whole tensor, what equals `value`."""
        here = counts[self.place.start // self.place.block :]
        call_checked("stored_equal", self.lowered, which, value, here.ctypes.data)

    def mark(self, cut: Cut) -> Arena:
        """Return a bit for each element: 1 where the spread belongs to the cut; as the pass before noted, or anew."""
        note = self.work.find_note(self._note_key(cut))
        if note is not None:
            return note
        mask, bits = self.work.take_bytes(self.size), self._make_bits()
        lowered = ctypes.byref(_lower_cut(cut))
        call_checked("stored_marks", self.lowered, SPREAD, lowered, mask.ctypes.data, bits.ctypes.data)
        return bits

    def _note_key(self, cut: Cut) -> tuple[int, ...]:
        return (self.owner, SPREAD, self.place.start, cut.above, cut.ties)

    @property
    def _cuts(self) -> int:
        return count_cuts(self.size, self.place.block)

    @functools.cached_property
    def lowered(self) -> Any:
        """Return a pointer to the slab as the loops want it; it holds what it points into."""
        data = (ctypes.c_void_p * len(self.arrays))(*(array.ctypes.data for array in self.arrays))
        dtypes, scales = _lower_dtypes(self.dtypes), _lower_floats(self.scales or (1.0,) * self.count)
        vectors = (ctypes.c_int32 * self.count)(*self.vectors)
        pointers = [ctypes.addressof(array) for array in (data, dtypes, vectors, scales)]
        derived, alive = _lower_derived(self.derived)
        slab = structures.NativeSlab(
            *pointers, self.count, self.has_base, self.size, self.place.start, self.place.block, derived
        )
        slab.alive = (data, dtypes, vectors, scales, alive)
        return ctypes.byref(slab)

    def lower_keeps(self, fusion: Fusion) -> tuple[list[structures.NativeKeep], list[Any]]:
        """Return what is kept of each tensor, and what that points into; nothing where all of all is."""
        if fusion.marked is not None:
            bits = self.mark(fusion.marked)
            return [structures.NativeKeep(kind=_KINDS["mask"], factor=1.0, mask=bits.ctypes.data)] * self.count, [bits]
        if not fusion.keeps:
            return [], []
        lowered, alive = zip(*(self._lower_keep(which, keep) for which, keep in enumerate(fusion.keeps)), strict=True)
        return list(lowered), list(alive)

    def _lower_keep(self, which: int, keep: Keep) -> tuple[structures.NativeKeep, Any]:
        """Return one tensor's keep, and what it points into."""
        lowered = structures.NativeKeep(kind=_KINDS["all"], factor=keep.factor)
        alive: Keys | Arena | None = None
        if keep.nothing:
            lowered.kind = _KINDS["nothing"]
        elif keep.cut is not None:
            lowered.kind, lowered.cut = _KINDS["cut"], _lower_cut(keep.cut)
            lowered.has_outliers = keep.outliers is not None
            lowered.outliers = _lower_cut(keep.outliers or _NO_CUT)
        elif keep.ranks:
            lowered.kind, lowered.rank = _KINDS["rank"], keep.ranks[0]
            lowered.outlier_rank = keep.ranks[1] if len(keep.ranks) > 1 else 0
        elif keep.limit is not None:
            alive = keys = self._find_keys(which)
            lowered.kind, lowered.limit, lowered.keys = _KINDS["random"], keep.limit, keys.ctypes.data
        elif keep.limits is not None:
            alive = bits = self._mark_rows(which, keep.limits)
            lowered.kind, lowered.mask = _KINDS["mask"], bits.ctypes.data
        return lowered, alive

    def _mark_rows(self, which: int, limits: Limits, sums: native.Sums | None = None) -> Arena:
        """Return a bit for each element: 1 where its random number is under the limit of its rank in its row.

        What one pass has marked is noted for the next. `sums` gets those of `sum_absolute`.
        """
        key = (self.owner, which, self.place.start)
        note = None if sums is not None else self.work.find_note(key)
        if note is not None:
            return note
        bits, keys = self._make_bits(), self._find_keys(which)
        pointers = (limits.ctypes.data, keys.ctypes.data, bits.ctypes.data)
        norms = (None, None) if sums is None else (sums[0].ctypes.data, sums[1].ctypes.data)
        call_checked("stored_rows", self.lowered, which, len(limits), *pointers, *norms)
        self.work.note(key, bits)
        return bits

    def _make_bits(self) -> Arena:
        return np.empty(-(-self.size // 8), np.uint8)

    def _find_keys(self, which: int) -> Keys:
        return find_keys(self.place, self.place.models[which], self.size)


def merge_slabs(
    slabs: Sequence[StoredSlab], fusions: Sequence[Fusion], dtype: str, squares: native.Sums | None
) -> tuple[Arena, list[int]]:
    """Return merged slabs as `dtype`, as bytes one after the other, and how many values of each are not finite.

    Several slabs are of one size and kind, and nothing is derived of them. `squares`, unless None, is filled as `Watch`
    objects want it: for each slab a row for the base, each tensor and the result.
    """
    first = slabs[0] if fusions[0].derived is slabs[0].derived else replace(slabs[0], derived=fusions[0].derived)
    keeps, alive = zip(*(slab.lower_keeps(fusion) for slab, fusion in zip(slabs, fusions, strict=True)), strict=True)
    joins, floats = zip(*(_lower_join(fusion.join) for fusion in fusions), strict=True)
    merged = _merge_lowered(first, [each.arrays for each in slabs], keeps, joins, dtype, squares)
    del alive, floats  # until here the structures point into them
    return merged


def merge_alike(
    first: StoredSlab, arrays: Sequence[Sequence[Arena]], fusion: Fusion, dtype: str, squares: native.Sums
) -> tuple[Arena, list[int]]:
    """The same of slabs that are whole tensors, of which one is given and the arrays of all, by one fusion."""
    keeps, alive = first.lower_keeps(fusion)
    join, floats = _lower_join(fusion.join)
    merged = _merge_lowered(first, arrays, [keeps] * len(arrays), [join] * len(arrays), dtype, squares)
    del alive, floats
    return merged


def _merge_lowered(
    first: StoredSlab,
    arrays: Sequence[Sequence[Arena]],
    keeps: Sequence[Sequence[structures.NativeKeep]],
    joins: Sequence[structures.NativeJoin],
    dtype: str,
    squares: native.Sums | None,
) -> tuple[Arena, list[int]]:
    many, broken = len(arrays), (ctypes.c_int64 * len(arrays))()
    out = first.work.take_bytes(many * first.size * (4 if dtype == "F32" else 2))
    slab, lowered = _lower_slabs(first, arrays), _lower_all_keeps(keeps, first.count)
    if any(keep.kind == _KINDS["rank"] for keep in keeps[0]):
        room = 2 * -(-first.size // _CHUNK) * _CHUNK
        with first.work.scratch():
            call_checked("find_cuts", slab, many, lowered, first.work.take_bytes(4 * room).ctypes.data, room)
    call_checked(
        "merge_stored",
        slab,
        many,
        lowered,
        (structures.NativeJoin * many)(*joins),
        out.ctypes.data,
        STORED_DTYPES[dtype],
        None if squares is None else squares.ctypes.data,
        0 if squares is None else squares.shape[2],
        broken,
    )
    return out, list(broken)


def _lower_slabs(first: StoredSlab, arrays: Sequence[Sequence[Arena]]) -> Any:
    """Return a pointer to the first slab, whose data are followed by those of the others."""
    if len(arrays) == 1:
        return first.lowered
    data = (ctypes.c_void_p * (len(arrays) * len(first.arrays)))(
        *[array.ctypes.data for of_one in arrays for array in of_one]
    )
    slab = structures.NativeSlab.from_buffer_copy(first.lowered._obj)
    slab.data, slab.alive = ctypes.addressof(data), (data, first)
    return ctypes.byref(slab)


def _lower_all_keeps(keeps: Sequence[Sequence[structures.NativeKeep]], count: int) -> Any:
    """Return the keeps of all slabs as one array; None where all is kept."""
    if not any(keeps):
        return None
    everything = [structures.NativeKeep(kind=_KINDS["all"], factor=1.0)] * count
    flat = [keep for of_one in keeps for keep in of_one or everything]
    return (structures.NativeKeep * len(flat))(*flat)


def subtract_stored(left: tuple[Arena, str], right: tuple[Arena, str], out: Arena) -> Arena:
    """Return one slab less another, each its bytes and dtype, as float32 in `out`."""
    (data, dtype), (less, less_dtype) = left, right
    kinds = LOWERED[dtype], LOWERED[less_dtype]
    pointers = data.ctypes.data, kinds[0], less.ctypes.data, kinds[1]
    call_checked("subtract_stored", *pointers, len(out) // 4, out.ctypes.data)
    return out


def _lower_cut(cut: Cut) -> structures.NativeCut:
    return structures.NativeCut(cut.threshold, cut.block, cut.block_ties)


@functools.lru_cache(64)
def _lower_dtypes(dtypes: tuple[str, ...]) -> Any:
    return (ctypes.c_int32 * len(dtypes))(*(LOWERED[dtype] for dtype in dtypes))


def _lower_floats(values: tuple[float, ...]) -> Any:  # not cached: 0.0 and -0.0 would share an entry
    return (ctypes.c_float * len(values))(*values)


def _lower_derived(derived: Derived | None) -> tuple[int | None, Any]:
    """Return where the structure lies, and what holds it and what it points into."""
    if derived is None:
        return None, None
    if isinstance(derived, Scores):
        least, span = ((ctypes.c_double * len(each))(*each) for each in (derived.least, derived.span))
        lowered = structures.NativeDerived(0, ctypes.addressof(least), ctypes.addressof(span))
        return ctypes.addressof(lowered), (lowered, least, span)
    rows, columns = len(derived.divergences), derived.columns
    lowered = structures.NativeDerived(1, None, None, derived.divergences.ctypes.data, rows, columns)
    return ctypes.addressof(lowered), (lowered, derived)


def _lower_join(join: Join) -> tuple[structures.NativeJoin, Any]:
    weight, masks = _lower_floats(join.weight), _lower_floats(join.masks)
    return structures.NativeJoin(
        kind=_JOINS[join.kind],
        normalize=join.normalize,
        weight=ctypes.addressof(weight),
        divisor=join.divisor,
        lambda_=join.lambda_,
        threshold=join.threshold,
        votes=join.votes,
        masks=ctypes.addressof(masks) if join.masks else None,
        group=join.group,
        kept=join.kept,
        lines=None if join.lines is None else join.lines.ctypes.data,
        columns=join.columns,
        line_count=0 if join.lines is None else join.lines.shape[1],
        by_row=join.by_row,
    ), (weight, masks, join.lines)


def call_checked(name: str, *arguments: Any) -> int:
    """Call a native loop; returns what it does, unless it refuses what it was given."""
    result = int(native.call(name, *arguments))
    if result == _NO_MEMORY:
        raise MemoryError("a native loop could not be given its scratch memory")
    if result < 0:
        raise ValueError(f"{name}: what it was given points out of its slab (a fault of mergemill)")
    return result

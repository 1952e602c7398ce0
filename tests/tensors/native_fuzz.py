"""Call every native loop with random bits, sizes and blocks: `python native_fuzz.py LIBRARY SECONDS SEED`.

To be run with a library that was built with sanitizers, which end the process at the first fault; every array is of the
size that the loop may touch, and no larger. The seed is printed, so that what was found can be found again.
"""

import ctypes
import errno
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mergemill.engine.checkpoint.gguf.header import KINDS
from mergemill.engine.tensors import native
from mergemill.engine.tensors.blocks import NATIVE
from mergemill.engine.tensors.structures import (
    NativeAdapted,
    NativeCoded,
    NativeCodes,
    NativeCut,
    NativeDerived,
    NativeFactor,
    NativeJoin,
    NativeKeep,
    NativeRank,
    NativeSlab,
    NativeWindow,
)

BLOCK, CHUNK, LAST = 65536, 1024, 32
ODD = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x3F800000], np.uint32)
REFUSED = -2
Array = np.ndarray[Any, np.dtype[Any]]


class Fuzz:
    """One call after another of what a seed makes."""

    def __init__(self, library: ctypes.CDLL, seed: int) -> None:
        self.library, self.random = library, np.random.default_rng(seed)
        self.alive: list[Any] = []

    def call(self, name: str, *arguments: Any) -> int:
        given = [pointer(each) if isinstance(each, np.ndarray) else each for each in arguments]
        return int(getattr(self.library, f"mergemill_{name}")(*given) or 0)

    def choose(self, *values: Any) -> Any:
        return values[self.random.integers(len(values))]

    def integer(self, low: int, high: int) -> int:
        """Return one of low…high."""
        return int(self.random.integers(low, high, endpoint=True))

    def size(self) -> int:
        near = self.choose(0, 1, 8, 16, 64, CHUNK, 2 * CHUNK, 5000)
        size = max(0, near + self.integer(-3, 3))
        return size if self.integer(0, 30) else BLOCK * self.integer(1, 2) + self.integer(-20, 20)

    def bits(self, size: int) -> Array:
        """Return words of some kind: of any value, of few values, NaN and infinity of both signs, of one exponent."""
        kind = self.integer(0, 4)
        words = self.random.integers(0, 1 << 32, size, dtype=np.uint32)
        if kind == 1:
            words = self.random.choice(ODD, size) | words & 0x80000000
        if kind == 2:
            words = words & 0x807FFFFF | 0x3F000000
        if kind == 3:
            words = words & 0x8000FFFF  # denormals
        if kind == 4:
            words[:] = words[:1].copy() if size else 0
        return words.astype(np.uint32)

    def floats(self, size: int) -> Array:
        return self.bits(size).view(np.float32)

    def number(self) -> float:
        return float(self.floats(1)[0])

    def slabs(self, size: int, least: int = 1) -> tuple[Any, int]:
        arrays = [self.floats(size) for _ in range(self.integer(least, 4))]
        return self.pointers(arrays), len(arrays)

    def pointers(self, arrays: list[Array]) -> Any:
        self.alive.append(arrays)
        return (ctypes.c_void_p * max(1, len(arrays)))(*map(pointer, arrays))

    def block(self) -> int:
        return self.choose(1, 7, 100, CHUNK, 3000, BLOCK, BLOCK + 5, 3 * BLOCK)

    def slab(self, *, many: int = 4) -> NativeSlab:
        """Return a slab of random tensors as they are stored."""
        size, block, has_base = self.size(), self.block(), self.integer(0, 1)
        count = self.integer(1, many)
        dtypes = self.random.integers(0, 5, count + has_base).astype(np.int32)
        data = [self.stored(size, dtype) for dtype in dtypes]
        scales = self.choose(np.ones(count, np.float32), self.floats(count))
        vectors = self.random.integers(0, 2, count).astype(np.int32)
        self.alive += [dtypes, vectors, scales, pointers := self.pointers(data)]
        start = block * self.integer(0, 3)
        address = ctypes.addressof(pointers)
        lowered = (pointer(each) for each in (dtypes, vectors, scales))
        slab = NativeSlab(address, *lowered, count, has_base, size, start, block)
        if self.integer(0, 1):
            self.alive.append(derived := self.derived(slab))
            slab.derived = ctypes.addressof(derived)
        return slab

    def stored(self, size: int, dtype: int) -> Array:
        """Return elements as they are stored: floats of 4 or 2 bytes, codes and what decodes them, or an adapter's."""
        if dtype == 4:
            self.alive.append(adapted := self.adapted(size))
            return np.frombuffer(adapted, np.uint8)
        if dtype == 3:
            self.alive.append(coded := self.coded(size))
            return np.frombuffer(coded, np.uint8)
        return self.bits(size) if dtype == 0 else self.bits(size).astype(np.uint16)

    def derived(self, slab: NativeSlab) -> NativeDerived:
        """Return what scores hang on, or importances; now and then for fewer rows than there are."""
        least, span = (self.floats(slab.count).astype(np.float64) for _ in range(2))
        columns = self.choose(1, 7, CHUNK, 5000, 1 << 62)
        rows = max(0, (slab.start + slab.size - 1) // columns + self.choose(0, 1, 1, 1))
        divergences = self.floats(rows).astype(np.float64)
        self.alive += [least, span, divergences]
        return NativeDerived(self.integer(0, 2), pointer(least), pointer(span), pointer(divergences), rows, columns)

    def cut(self, slab: NativeSlab) -> NativeCut:
        blocks = slab.size // slab.block + 4
        return NativeCut(abs(self.number()), self.integer(0, blocks), self.integer(0, 5))

    def keys(self, slab: NativeSlab) -> Array:
        blocks = (slab.start + max(slab.size, 1) - 1) // BLOCK - slab.start // BLOCK + 1
        self.alive.append(keys := self.bits(2 * blocks))
        return keys

    def keep(self, slab: NativeSlab) -> NativeKeep:
        keep = NativeKeep(kind=self.integer(0, 5), factor=self.number(), cut=self.cut(slab), outliers=self.cut(slab))
        keep.has_outliers, keep.limit = self.integer(0, 1), self.integer(-(2**31), 2**31 - 1)
        self.alive.append(mask := self.bits(-(-slab.size // 8)).astype(np.uint8))
        keep.keys, keep.mask = pointer(self.keys(slab)), pointer(mask)
        keep.rank, keep.outlier_rank = self.integer(0, slab.size), self.integer(0, slab.size)
        return keep

    def which(self, slab: NativeSlab, least: int = -1) -> int:
        """Return a tensor's number; now and then one that there is not."""
        odd = self.choose(-3, -2, slab.count, 2 * slab.count - 1, 2 * slab.count, 2**40)
        return odd if self.integer(0, 5) == 0 else self.integer(least, slab.count - 1)

    # ----------------------------------------------------------------------------------------------- over flat slabs
    def combine(self) -> None:
        slabs, count = self.slabs(size := self.size())
        self.call("combine", slabs, self.floats(count), count, size, self.number())

    def add_deltas(self) -> None:
        slabs, count = self.slabs(size := self.size(), 0)
        self.call("add_deltas", self.floats(size), slabs, self.floats(count), count, size, *self.two())

    def add_agreeing(self) -> None:
        slabs, count = self.slabs(size := self.size())
        normalize = self.integer(0, 1)
        self.call("add_agreeing", self.floats(size), slabs, self.floats(count), count, size, normalize, self.number())

    def two(self) -> tuple[float, float]:
        return self.number(), self.number()

    def keep_large(self) -> None:
        self.call("keep_large", self.floats(size := self.size()), size, self.number(), self.integer(0, 1))

    def keep_random(self) -> None:
        size, words = self.size(), [int(word) for word in self.bits(2)]
        self.call("keep_random", self.floats(size), self.bits(size), size, *words, self.integer(-(2**31), 2**31 - 1))

    def count_first(self) -> None:
        bins = self.choose(1, 2, 1000, 1 << 15, 1 << 16)
        bias, shift = self.choose(0, 1 << 31, 77), self.integer(0, 31)
        counts = np.zeros(bins, np.int64)
        self.call("count_first", self.bits(size := self.size()), size, bias, shift, counts, bins)
        assert counts.sum() == size

    def count_within(self) -> None:
        bins = self.choose(1, 2, 1000, 1 << 16)
        counts = np.zeros(bins, np.int64)
        low = int(self.bits(1)[0])
        self.call("count_within", self.bits(size := self.size()), size, low, self.integer(0, 31), counts, bins)
        assert counts.sum() <= size

    def count_equal(self) -> None:
        self.call("count_equal", self.floats(size := self.size()), size, self.number())

    def count_broken(self) -> None:
        self.call("count_broken", self.bits(size := self.size()).astype(np.uint16), size, self.choose(0x7F80, 0x7C00))

    def sum_absolute(self) -> None:
        size, block = self.size(), self.block()
        self.call("sum_absolute", self.floats(size), size, block, np.zeros((count_cuts(size, block), LAST)))

    def sum_products(self) -> None:
        size, block = self.size(), self.block()
        sums = np.zeros((count_cuts(size, block), LAST))
        self.call("sum_products", self.floats(size), self.floats(size), size, block, sums)

    def look(self) -> None:
        size, block = self.size(), self.block()
        slabs, count = self.slabs(size)
        chunks = count_cuts(size, block)
        samples, sums = np.zeros((chunks, CHUNK), np.float32), np.zeros((count, chunks))
        self.call("look", slabs, count, size, block, self.integer(0, 1), chunks, samples, sums)

    def compare(self) -> None:
        size, block = self.size(), self.block()
        chunks = count_cuts(size, block)
        self.call("compare", self.floats(size), size, block, self.floats(chunks * CHUNK), np.zeros(chunks))

    def fill_counters(self) -> None:
        self.call("fill_counters")

    # ------------------------------------------------------------------------------------ over slabs as they are stored
    def merge_stored(self) -> None:
        slab, many = self.slab(), self.integer(0, 3)
        inputs, count = self.repeat(slab, many), slab.count * many
        keeps = (NativeKeep * count)(*(self.keep(slab) for _ in range(count))) if self.integer(0, 3) else None
        joins = (NativeJoin * many)(*(self.join(slab) for _ in range(many)))
        dtype = self.integer(0, 2)
        out = np.zeros(slab.size * many, np.float32 if dtype == 0 else np.uint16)
        chunks = count_cuts(slab.size, slab.block)
        squares = self.choose(None, np.zeros((many, inputs + 1, chunks)))
        self.call("merge_stored", ref(slab), many, keeps, joins, out, dtype, squares, chunks, np.zeros(many, np.int64))

    def repeat(self, slab: NativeSlab, many: int) -> int:
        """Have the slab be followed by others of the same data; returns how many these are of each."""
        inputs = slab.count + slab.has_base
        self.alive.append(data := (ctypes.c_void_p * (inputs * many))(*self.find_data(slab, inputs) * many))
        slab.data = ctypes.addressof(data)
        return inputs

    def find_data(self, slab: NativeSlab, inputs: int) -> list[int | None]:
        """Return where the data of the slab's tensors lie."""
        return list((ctypes.c_void_p * inputs).from_address(slab.data))

    def join(self, slab: NativeSlab) -> NativeJoin:
        """Return how a slab is joined."""
        self.alive += [weight := self.floats(slab.count), masks := self.floats(slab.count)]
        kinds = self.integer(0, 13), self.integer(0, 1)
        join = NativeJoin(*kinds, pointer(weight), *self.two(), *self.two())
        join.masks = self.choose(None, pointer(masks))
        join.group, join.kept = self.choose(1, 2, 64, 256, 1024, 7, 0, 2048), self.choose(0, 1, 40, 2000, -1)
        join.columns, join.by_row = self.choose(0, 1, 7, 600, 3000, 1 << 62), self.integer(0, 1)
        last = (slab.start + slab.size - 1) // join.columns if join.columns else 0
        join.line_count = max(0, last + self.choose(0, 1, 1, 1)) if join.by_row else min(join.columns, 3000)
        self.alive.append(lines := self.floats(slab.count * join.line_count))
        join.lines = self.choose(None, pointer(lines), pointer(lines))
        return join

    def whole_rows(self, columns: int) -> NativeSlab:
        """Return a slab of whole rows, and of blocks of these; now and then not."""
        slab = self.slab()
        if 0 < columns <= 3000 and self.integer(0, 9):
            slab.block = columns * self.choose(1, 3, 2000)
            slab.size -= slab.size % columns
            slab.start = slab.block * self.integer(0, 3)
        return slab

    def stored_columns(self) -> None:
        columns = self.choose(0, 1, 2, 7, 600, 3000, 1 << 62)
        slab = self.whole_rows(columns)
        digits = np.zeros((2 * slab.count + 1, 3, min(columns, 3000)), np.int64)
        self.call("stored_columns", ref(slab), columns, ctypes.c_double(self.number()), digits)

    def stored_row_squares(self) -> None:
        columns = self.choose(0, 1, 2, 7, 600, 3000, 1 << 62)
        slab = self.whole_rows(columns)
        rows = max(0, (slab.start + slab.size) // columns + self.choose(0, 0, 1, -1)) if columns else 0
        sums = np.zeros((2 * slab.count + 1, rows))
        self.call("stored_row_squares", ref(slab), columns, ctypes.c_double(self.number()), rows, sums)

    def stored_products(self) -> None:
        slab = self.slab()
        cuts = count_cuts(slab.size, slab.block)
        sums = np.zeros((slab.count * (slab.count + 1) // 2, cuts, LAST))
        self.call("stored_products", ref(slab), sums, cuts)

    def stored_changes(self) -> None:
        slab = self.slab()
        counts = np.zeros((slab.count, 2), np.int64)
        self.call("stored_changes", ref(slab), self.number(), counts)
        assert (counts.sum(axis=1) <= slab.size).all()

    def stored_extremes(self) -> None:
        slab = self.slab()
        self.call("stored_extremes", ref(slab), np.zeros((slab.count, 2)))

    def stored_compared(self) -> None:
        """Of two tensors mostly, whose bytes are compared where that is allowed, and now and then where it is not."""
        slab = self.slab(many=2)
        columns = self.choose(-1, 0, 1, 7, 50, 100, 1 << 62)
        if 0 < columns <= 100:
            slab.block = columns * self.choose(1, 3, 2000)
            slab.size -= slab.size % columns
            slab.start = slab.block * self.integer(0, 3)
        cuts, rows = count_cuts(slab.size, slab.block), slab.size // columns if columns > 0 else 0
        given = cuts + self.choose(0, 0, 0, 0, 1)
        sums, counts, fourths = (
            np.zeros((4, cuts)),
            np.zeros(9 + 512, np.int64),
            np.zeros((2, -(-slab.size // slab.block))),
        )
        squares = self.choose(None, np.zeros((3, rows)))
        sketch = self.choose(None, np.zeros((2, 32, max(0, min(columns, 100))), np.float32))
        alike = self.integer(0, 7)
        self.call("stored_compared", ref(slab), alike, given, sums, counts, columns, fourths, squares, sketch)
        assert (counts[:2] <= slab.size).all()

    def stored_divergences(self) -> None:
        slab = self.slab(many=2)
        columns = self.choose(-1, 0, 1, 2, 7, 600, 3000, 1 << 62)
        if 0 < columns <= 3000:
            slab.size -= slab.size % columns
        self.call("stored_divergences", ref(slab), columns, np.zeros(max(0, slab.size // columns if columns else 0)))

    def stored_norms(self) -> None:
        slab = self.slab()
        sums = np.zeros((2, cuts := count_cuts(slab.size, slab.block), LAST))
        whole, kept = sums[0].copy(), sums[1].copy()
        assert len(whole) == cuts
        self.call("stored_norms", ref(slab), self.which(slab, 0), ref(self.keep(slab)), whole, kept)

    def stored_marked_squares(self) -> None:
        slab = self.slab()
        cuts = count_cuts(slab.size, slab.block)
        mask, bits = np.zeros(slab.size, np.uint8), np.zeros(-(-slab.size // 8), np.uint8)
        cut = self.choose(None, ref(self.cut(slab)))
        self.call("stored_marked_squares", ref(slab), cut, mask, bits, np.zeros((slab.count, cuts, LAST)), cuts)

    def stored_sample(self) -> None:
        slab = self.slab()
        run, first, stride = self.choose(1, 64, CHUNK, CHUNK + 1), self.integer(0, 200), self.integer(0, 3000)
        runs = max(0, (slab.size - first - run) // max(stride, 1) + 1)
        out = np.zeros((runs, run), np.uint32)
        refused = self.call("stored_sample", ref(slab), self.which(slab), first, stride, run, out) == REFUSED
        assert refused or (run <= CHUNK and stride)

    def stored_windows(self) -> None:
        slab, many = self.slab(), self.integer(0, 3)
        blocks = -(-slab.size // slab.block)
        windows = (NativeWindow * many)()
        for window in windows:
            low, high = sorted(int(word) & 0x7FFFFFFF for word in self.bits(2))
            window.which, window.low, window.high = self.which(slab), low, high
            room = self.choose(0, 3, slab.size)
            arrays = [np.zeros(blocks, np.int64) for _ in range(3)]
            self.alive += [*arrays, keys := np.zeros(room, np.uint32)]
            window.low_counts, window.high_counts, window.counts = map(pointer, arrays)
            window.keys, window.room = pointer(keys), room
        self.call("stored_windows", ref(slab), windows, many)
        assert all(0 <= window.above + window.inside <= slab.size for window in windows)

    def stored_ranks(self) -> None:
        slab, many = self.slab(), self.integer(0, 3)
        ranks = (NativeRank * many)()
        for rank in ranks:
            rank.which, rank.rank = self.which(slab), self.integer(0, slab.size)
            rank.share = self.choose(0.0, 0.5, 1.0)
        row = -(-slab.size // CHUNK) * CHUNK
        self.alive.append(keys := np.zeros((many + 1) * row, np.uint32))
        self.call("stored_ranks", ref(slab), ranks, many, keys, len(keys))
        assert all(0 <= rank.above <= slab.size and 0 <= rank.block_ties <= rank.ties for rank in ranks)

    def find_cuts(self) -> None:
        slab, many = self.slab(), self.integer(0, 3)
        self.repeat(slab, many)
        keeps = (NativeKeep * (slab.count * many))(*(self.keep(slab) for _ in range(slab.count * many)))
        ranked = [keep.kind == 5 for keep in keeps]
        self.alive.append(keys := np.zeros(2 * -(-slab.size // CHUNK) * CHUNK, np.uint32))
        done = self.call("find_cuts", ref(slab), many, keeps, keys, len(keys))
        assert done == REFUSED or all(keep.kind == 2 for keep, was in zip(keeps, ranked, strict=True) if was)

    def stored_upper(self) -> None:
        slab, many = self.slab(), self.integer(0, 3)
        which = np.array([self.which(slab) for _ in range(many)], np.int64)
        self.call("stored_upper", ref(slab), which, self.pointers([np.zeros(1 << 15, np.int64) for _ in which]), many)

    def stored_lower(self) -> None:
        slab = self.slab()
        prefix = int(self.bits(1)[0]) >> self.choose(0, 16, 17)
        self.call("stored_lower", ref(slab), self.which(slab), prefix, np.zeros(1 << 16, np.int64))

    def subtract_stored(self) -> None:
        slab = self.slab(many=2)
        kinds = [self.integer(0, 4) for _ in range(2)]
        data = [self.stored(slab.size, kind) for kind in kinds]
        self.call("subtract_stored", data[0], kinds[0], data[1], kinds[1], slab.size, self.floats(slab.size))

    def decode(self) -> None:
        size, kind = self.size(), self.integer(0, 4)
        done = self.call("decode", self.stored(size, kind), kind, size, self.floats(size))
        assert done in ((0,) if kind < 3 else (0, REFUSED))

    def factor(self, matrices: int, vectors: int, rank: int) -> NativeFactor:
        """Return a factor that is mostly right: of too few elements, or with odd strides, now and then."""
        beside, across = self.choose((rank, 1), (1, vectors), (rank, 1), (1, vectors), (rank + 3, 1))
        if self.integer(0, 20) == 0:
            beside, across = self.choose((0, 1), (-1, 1), (1 << 40, 1), (1, 1 << 62))
        start, along = self.choose(0, 0, 0, 5), vectors * rank * self.integer(0, 1)
        needed = start + (matrices - 1) * along + (vectors - 1) * beside + (rank - 1) * across + 1
        size = needed if 0 < needed < 1 << 20 else 10
        kind, size = self.integer(0, 2), max(0, size - self.choose(*[0] * 30, 1))
        data = self.bits(size) if kind == 0 else self.bits(size).astype(np.uint16)
        self.alive.append(data)
        start = -1 if self.integer(0, 50) == 0 else start
        return NativeFactor(pointer(data), kind, size, start, beside, across, along)

    def adapted(self, size: int) -> NativeAdapted:
        """Return a slab of matrices with a product, of weights in any form, with just the room that it needs."""
        rows, columns, rank = self.integer(1, 70), self.choose(1, 3, 16, 33, 255, 512, 1100), self.integer(1, 9)
        start, group, wide = self.integer(0, 3000), self.choose(4, 8, 16), -(-columns // 16) * 16
        matrices = (start + max(size, 1) - 1) // columns // rows + 1
        dtype = self.integer(0, 4 if self.integer(0, 3) == 0 else 3)
        factors = self.factor(matrices, rows, rank), self.factor(matrices, columns, rank)
        room = self.floats(wide * (rank + group) + group * rank - self.choose(*[0] * 30, 1))
        self.alive += [weight := self.stored(size, dtype), room, there := np.array([-1, -1], np.int64)]
        lies = (start, rows, columns, rank, self.choose(*[group] * 30, 0, 6))
        return NativeAdapted(
            pointer(weight), dtype, self.number(), *lies, *factors, pointer(room), len(room), pointer(there)
        )

    def stored_equal(self) -> None:
        slab = self.slab()
        counts = np.zeros(-(-slab.size // slab.block), np.int64)
        self.call("stored_equal", ref(slab), self.which(slab), self.number(), counts)

    def stored_rows(self) -> None:
        slab = self.slab()
        columns = self.choose(0, 1, 2, 7, 16, 31, 600, 3000, 1 << 31)
        if 0 < columns <= 3000:
            slab.size -= slab.size % columns
        limits = np.sort(self.random.integers(-(2**31), 2**31, min(columns, 3000)).astype(np.int32))
        if self.integer(0, 1):
            limits = limits[::-1].copy()
        norms = [np.zeros((count_cuts(slab.size, slab.block), LAST)) for _ in range(2)]
        bits = np.zeros(-(-slab.size // 8), np.uint8)
        which, given = self.which(slab, 0), norms if self.integer(0, 1) else [None, None]
        done = self.call("stored_rows", ref(slab), which, columns, limits, self.keys(slab), bits, *given)
        assert done == REFUSED or 0 < columns <= 3000

    def stored_marks(self) -> None:
        slab = self.slab()
        mask, bits = np.zeros(slab.size, np.uint8), np.zeros(-(-slab.size // 8), np.uint8)
        self.call("stored_marks", ref(slab), self.which(slab), ref(self.cut(slab)), mask, bits)

    # --------------------------------------------------------------------------------------------- over quantised codes
    def codes(self, count: int, scales: int) -> NativeCodes:
        """Return codes, after up to one that is skipped, with tables; now and then of bits that there are not."""
        bits, skipped = self.choose(4, 8), 0
        if bits == 4:
            skipped = self.integer(0, 1)
        stored = self.bits(-(-(count + skipped) * bits // 8)).astype(np.uint8)
        tables = [self.floats(1 << bits), self.floats(scales), self.floats(scales)]
        self.alive += [stored, *tables]
        if self.integer(0, 50) == 0:
            bits = self.choose(0, 3, 16)
        zeros = pointer(tables[2]) if self.integer(0, 1) else None
        given = map(pointer, tables[:2])
        return NativeCodes(pointer(stored), skipped, bits, self.integer(0, 1), *given, zeros, self.number())

    def coded(self, size: int) -> NativeCoded:
        """Return a slab of codes that has just what its elements need."""
        rows, columns, block_rows, block_columns = (self.choose(1, 2, 7, 32, 500) for _ in range(4))
        row_codes, start = columns + self.choose(0, 0, 3), self.integer(0, 5000)
        down, across = -(-rows // block_rows), -(-columns // block_columns)
        ends = (start, max(start, start + size - 1))
        first, last = (at // columns * row_codes + at % columns for at in ends)
        from_block, to_block = (at // columns // rows * down + at // columns % rows // block_rows for at in ends)
        codes, scales = last - first + 1, (to_block - from_block + 1) * across
        lies = (rows, columns, row_codes, block_rows, block_columns, from_block)
        return NativeCoded(self.codes(codes, scales), start, *lies, codes, scales)

    def dequantize_rows(self) -> None:
        size = min(self.size(), 20_000)
        coded = self.coded(size)
        asked = size + self.choose(0, 0, 0, 500, 1 << 40)  # of which there are no codes
        done = self.call("dequantize_rows", ref(coded), asked, np.zeros(size, np.float32))
        assert done == (0 if coded.codes.bits in (4, 8) and asked == size else REFUSED)

    def decode_blocks(self) -> None:
        number = self.integer(0, len(NATIVE) - 1)
        kind = next(each for each in KINDS.values() if each.name == NATIVE[number])
        count = self.integer(0, 20)
        blocks = self.random.integers(0, 256, count * kind.block_bytes, dtype=np.uint8)
        start = self.integer(0, count * kind.block)
        size = self.integer(0, count * kind.block - start)
        asked = size + self.choose(0, 0, 0, count * kind.block + 1, 1 << 62)  # of which there are no blocks
        wanted = self.choose(number, number, number, -1, len(NATIVE))
        done = self.call("decode_blocks", wanted, blocks, blocks.size, start, asked, np.zeros(size, np.float32))
        assert done == (0 if asked == size and wanted == number else REFUSED)

    def dequantize_columns(self) -> None:
        columns, size = self.choose(1, 7, 16, 17, 200), min(self.size(), 5000)
        start = self.integer(0, columns - 1)
        rows = -(-(start + size) // columns)
        at = [
            self.random.integers(0, most, count)
            for most, count in ((500, rows), (20, rows), (500, columns), (20, columns))
        ]
        if self.integer(0, 1):
            at[0] = at[0][:1] + np.arange(rows)
        given = self.codes(int(at[0].max(initial=0) + at[2].max()) + 1, 40)
        done = self.call("dequantize_columns", ref(given), start, size, columns, *at, np.zeros(size, np.float32))
        assert done == (0 if given.bits in (4, 8) else REFUSED)

    def pursue(self) -> None:
        rows, width, terms = self.integer(1, 700), self.integer(1, 40), self.integer(1, 30)
        dtype = self.integer(0, 2)
        values = self.floats(rows * width) if dtype == 0 else self.bits(rows * width).astype(np.uint16)
        room = np.zeros(self.call("pursuit_bytes", rows, width, terms), np.uint8)
        products = np.random.default_rng(rows).integers(-32767, 32768, rows * rows - self.choose(0, 0, rows), np.int16)
        numbers, weights, target = np.zeros(terms, np.int64), np.zeros(terms), self.bits(2 * width).view(np.float64)
        unsure = abs(self.number())
        with tempfile.TemporaryFile() as file:
            file.write(products)
            file.flush()
            given = values, dtype, rows, width, terms, self.floats(rows), file.fileno(), unsure, room, target
            count = self.call("pursue", *given, self.floats(rows), numbers, weights)
        taken = numbers[: max(count, 0)].tolist()
        assert count == -errno.EIO or 0 <= count <= terms
        assert len(set(taken)) == len(taken)
        assert not taken or (min(taken) >= 0 and max(taken) < rows)

    pursuit_bytes = pursue

    # ----------------------------------------------------------------------------------------------- over none
    def plain_floats(self) -> None:
        before = np.zeros(1, np.uint64)
        self.call("plain_floats", before)
        self.call("restore_floats", int(before[0]))

    restore_floats = plain_floats

    def read_ranges(self) -> None:
        count, window, into = self.integer(0, 1100), self.choose(1, 4096, 1 << 17), np.zeros(5000, np.uint8)
        sizes = self.random.integers(0, 200, count)
        places, offsets = (
            self.random.integers(0, 4800, count),
            self.random.integers(0, self.choose(5000, 1 << 16), count),
        )
        asked, error = np.zeros(1, np.int64), np.zeros(1, np.int32)
        with open(__file__, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            given = (file.fileno(), offsets, places, sizes, count, window, into, asked, error)
            done = self.call("read_ranges", *given)
        assert (done == count) == bool(((offsets + sizes <= end) | (sizes == 0)).all())
        assert done == count or (error[0] == -1 and offsets[done] + sizes[done] > end)


def pointer(array: Array) -> int:
    return int(array.ctypes.data)


def ref(structure: ctypes.Structure) -> Any:
    return ctypes.byref(structure)


def count_cuts(size: int, block: int) -> int:
    """Return how many sums there are: of each block, and of each BLOCK of it."""
    whole, rest = divmod(size, block)
    return whole * -(-block // BLOCK) + -(-rest // BLOCK)


def main(path: str, seconds: float, seed: int) -> None:
    library = native.declare(ctypes.CDLL(path), path)
    names = sorted(native.SIGNATURES)
    loops: dict[str, Callable[[Fuzz], None]] = {name: getattr(Fuzz, name) for name in names}
    called, stop = dict.fromkeys(names, 0), time.monotonic() + seconds
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    while time.monotonic() < stop or not all(called.values()):
        fuzz = Fuzz(library, seed)
        for name in names:
            loops[name](fuzz)
            called[name] += 1
        seed += 1
    sys.stdout.write(f"calls {sum(called.values())}\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))

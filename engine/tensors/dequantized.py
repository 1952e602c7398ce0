"""Quantised tensors as expressions: a code of 4 or 8 bits for each element, a scale and a zero point for many.

An element is ``(table[code] - zero) · scale · factor``, in this order and in float32; other dtypes are casts of that,
as they are where the packages that made the checkpoint dequantise it. So merges see the float32 product, which a
dequantised bfloat16 model has rounded already (decided on 2026-11-29: no rounding that nobody asked for).

`Dequantized` has its codes in the order of its elements: they are read slab by slab. `Transposed` is stored the other
way round (GPTQ, AWQ, the experts of gpt-oss): of what a task needs of it, all is held. Both do it by a native loop,
where there is one; else by NumPy, with the same bits.
"""

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergemill.engine.errors import MergeError
from mergemill.engine.tensors import native
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Leaf, Read, Stored
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.numbers import Floats, Numbers, decode, find_table
from mergemill.engine.tensors.rounds import Plain
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.stored import CODED, call_checked
from mergemill.engine.tensors.structures import NativeCoded, NativeCodes
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, tensor_of

_PLACES_BYTES = 128  # that NumPy takes for an element where there is no native loop


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a tensor, one after the other, and what they stand for."""

    stored: Stored
    bits: int  # 4 or 8
    table: str | Stored  # what `find_table` calls it, or 16 stored values
    high_first: bool = False  # of the two codes of a byte

    def find_range(self, first: int, last: int) -> tuple[int, int]:
        """Return offset and size, in bytes, of what holds the codes `first` to `last` (excluded)."""
        start, stop = first * self.bits // 8, -(-last * self.bits // 8)
        return self.stored.offset_bytes + start, stop - start

    def read(self, first: int, last: int) -> Read:
        """Return what is to be read for these codes."""
        return Read(self.stored.read_from or self.stored.pin, *self.find_range(first, last))

    def take_table(self, work: Workspace) -> Floats:
        """Return what each code stands for."""
        if isinstance(self.table, str):
            return find_table(self.table)
        (wanted,) = self.table.reads(Span(0, self.table.size))
        return decode(work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes), self.table.dtype)

    def hold_table(self) -> Iterator[Read]:
        """Yield the table, where it is stored."""
        if isinstance(self.table, Stored):
            yield from self.table.reads(Span(0, self.table.size))

    def describe(self) -> Any:
        """What is stored, and how."""
        table = self.table if isinstance(self.table, str) else self.table.describe()
        return {"codes": self.stored.describe(), "bits": self.bits, "table": table, "high_first": self.high_first}


class Decoded(Leaf):
    """What all that is stored as codes has in common: it is made on the CPU, as float32."""

    __slots__ = ()

    def suits_device(self, device: str) -> bool:
        """It is made on the CPU, and so is what is merged with it."""
        return False

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`: none are stored so."""
        return Plain.encode(self, span, work, dtype, watch)

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span dequantised, and cast to `dtype`."""
        raw = self._make(span, work)
        return tensor_of(raw).view(torch.float32) if dtype == "F32" else work.decode(tensor_of(raw), "F32", dtype)

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span dequantised, as float32."""
        return self._make(span, work), "F32"

    def _make(self, span: Span, work: Workspace) -> Arena:
        raw = work.take_bytes(4 * span.size)
        if span.size:
            self._fill(span, work, raw.view(np.float32))
        return raw

    def _fill(self, span: Span, work: Workspace, out: Floats) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Dequantized(Decoded):
    """Matrices whose codes lie in the order of their elements, with a scale for every block of rows and columns."""

    codes: Codes
    scales: Numbers  # one a block, row by row of a matrix's blocks, matrix by matrix
    shape: tuple[int, ...]
    dtype: str  # that a loader gives it
    rows: int  # of one matrix
    columns: int
    row_codes: int  # from one row to the next; more than columns where rows are filled up
    block_rows: int
    block_columns: int
    zeros: Numbers | None = None
    factor: float = 1.0

    @property
    def _grid(self) -> tuple[int, int]:
        """Blocks of one matrix, down and across."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's codes."""
        yield self.codes.read(*self._find_codes(span))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield the scales and zero points of the span, and the table."""
        places = self._find_blocks(span)
        yield from self.codes.hold_table()
        yield from self.scales.holds(places)
        if self.zeros is not None:
            yield from self.zeros.holds(places)

    @property
    def is_lowered(self) -> bool:
        """Native loops decode codes where they take them."""
        return native.load() is not None

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the codes and all that decodes them, where there are native loops."""
        if not self.is_lowered or not span.size:
            return Decoded.lower(self, span, work)
        return np.frombuffer(memoryview(self._lower(span, work)), np.uint8), CODED

    def lowered_bytes(self, elements: int) -> int:
        """Codes, and scales as they are picked."""
        return self.slab_bytes(elements, "F32") - aligned(4 * elements)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Codes, float32, the cast, and scales as they are picked."""
        across = self._grid[1]
        blocks = (
            elements // max(1, self.columns * self.block_rows) + 2 + elements // max(1, self.columns * self.rows)
        ) * across
        tables = [each for each in (self.scales, self.zeros) if each is not None]
        beside = sum(each.pick_bytes(blocks) for each in tables)
        cast = 0 if dtype == "F32" else aligned(elements * item_bytes(dtype))
        # A row that is filled up has codes of no elements.
        codes = aligned(
            (elements + 2 * self.row_codes - self.columns)
            * self.row_codes
            // max(1, self.columns)
            * self.codes.bits
            // 8
            + 8
        )
        plain = 0 if native.load() is not None else _PLACES_BYTES * elements
        return codes + aligned(4 * elements) + cast + beside + plain

    def describe(self) -> Mapping[str, Any]:
        """What is stored, and how it lies."""
        return {
            "dequantized": self.codes.describe(),
            "scales": self.scales.describe(),
            "zeros": None if self.zeros is None else self.zeros.describe(),
            "shape": list(self.shape),
            "lies": [self.rows, self.columns, self.row_codes, self.block_rows, self.block_columns],
            "factor": self.factor,
        }

    def _find_codes(self, span: Span) -> tuple[int, int]:
        if not span.size:
            return 0, 0
        first, last = span.start, span.stop - 1
        return (
            first // self.columns * self.row_codes + first % self.columns,
            last // self.columns * self.row_codes + last % self.columns + 1,
        )

    def _find_blocks(self, span: Span) -> slice:
        """Return the scales of all blocks in the rows of blocks that the span touches."""
        if not span.size:
            return slice(0, 0)
        down, across = self._grid
        ends = (
            row // self.rows * down + row % self.rows // self.block_rows
            for row in (span.start // self.columns, (span.stop - 1) // self.columns)
        )
        first, last = ends
        return slice(first * across, (last + 1) * across)

    def _take(self, span: Span, work: Workspace) -> tuple["_Given", int, int]:
        """Return what the span is made of, and the number of its first code and of its first row of blocks."""
        places, (first, _) = self._find_blocks(span), self._find_codes(span)
        (wanted,) = self.reads(span)
        codes = work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)
        scales = self.scales.pick(places, work)
        zeros = None if self.zeros is None else self.zeros.pick(places, work)
        skipped = first - (wanted.offset_bytes - self.codes.stored.offset_bytes) * 8 // self.codes.bits
        given = _Given(codes, self.codes, self.codes.take_table(work), scales, zeros, self.factor, skipped)
        return given, first, places.start // self._grid[1]

    def _lower(self, span: Span, work: Workspace) -> NativeCoded:
        given, _, first_block = self._take(span, work)
        codes, alive = given.lower()
        lies = (self.rows, self.columns, self.row_codes, self.block_rows, self.block_columns, first_block)
        counts = (len(given.raw) * 8 // self.codes.bits - given.skipped, given.scales.size)
        lowered = NativeCoded(codes, span.start, *lies, *counts)
        lowered.alive = alive
        return lowered

    def _fill(self, span: Span, work: Workspace, out: Floats) -> None:
        if native.load() is not None:
            call_checked("dequantize_rows", ctypes.byref(self._lower(span, work)), span.size, out.ctypes.data)
            return
        given, first, first_block = self._take(span, work)
        at = np.arange(span.start, span.stop)
        row, column = at // self.columns, at % self.columns
        down, across = self._grid
        block = (row // self.rows * down + row % self.rows // self.block_rows - first_block) * across
        given.fill(row * self.row_codes + column - first, block + column // self.block_columns, out)


@dataclass(frozen=True, slots=True)
class Transposed(Decoded):
    """Matrices ``[rows, columns]`` whose codes are stored column after column, or in words of several of them.

    The code of row o and column i is at ``rows_at(o) + columns_at(i)``, its scale in row ``i // group`` (or where
    `order` says) and column ``o // across`` of a table.
    """

    codes: Codes
    scales: Numbers
    shape: tuple[int, ...]
    dtype: str
    rows: int  # of one matrix
    columns: int
    row_step: "Stride"
    column_step: "Stride"
    matrix_codes: int  # from one matrix to the next
    group: int  # columns that share a scale
    across: int  # rows that share a scale
    zeros: Numbers | None = None
    order: Stored | None = field(default=None)  # the row of the table of scales for each column (act-order)

    @property
    def grain(self) -> int:
        """A matrix: of any row of it, all columns are read."""
        return max(1, self.rows * self.columns)

    @property
    def _table(self) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        return -(-self.columns // self.group), -(-self.rows // self.across)

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing slab by slab."""
        return iter(())

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield all of the matrices that the span touches."""
        size, (down, across) = self.grain, self._table
        first, last = (0, 0) if not span.size else (span.start // size, -(-span.stop // size))
        places = slice(first * down * across, last * down * across)
        yield self.codes.read(first * self.matrix_codes, last * self.matrix_codes)
        yield from self.codes.hold_table()
        yield from self.scales.holds(places)
        if self.zeros is not None:
            yield from self.zeros.holds(places)
        if self.order is not None:
            yield from self.order.reads(Span(0, self.order.size))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Float32, the cast, and scales as they are picked."""
        rows = elements // max(1, self.columns) + 2
        blocks = (rows // self.across + 2) * self._table[0]
        tables = [each for each in (self.scales, self.zeros) if each is not None]
        beside = sum(each.pick_bytes(blocks) for each in tables) + 8 * blocks + 32 * (rows + self.columns)
        cast = 0 if dtype == "F32" else aligned(elements * item_bytes(dtype))
        plain = 0 if native.load() is not None else _PLACES_BYTES * elements
        return aligned(4 * elements) + cast + beside + plain

    def describe(self) -> Mapping[str, Any]:
        """What is stored, and how it lies."""
        steps = [[each.group, each.step, list(each.inner)] for each in (self.row_step, self.column_step)]
        return {
            "transposed": self.codes.describe(),
            "scales": self.scales.describe(),
            "zeros": None if self.zeros is None else self.zeros.describe(),
            "order": None if self.order is None else self.order.describe(),
            "shape": list(self.shape),
            "lies": [self.rows, self.columns, steps, self.matrix_codes, self.group, self.across],
        }

    def _fill(self, span: Span, work: Workspace, out: Floats) -> None:
        start = span.start
        while start < span.stop:
            matrix = start // self.grain
            stop = min(span.stop, (matrix + 1) * self.grain)
            here = out[start - span.start : stop - span.start]
            self._fill_of(matrix, Span(start - matrix * self.grain, stop - matrix * self.grain), work, here)
            start = stop

    def _fill_of(self, matrix: int, span: Span, work: Workspace, out: Floats) -> None:
        """Fill in a span of one matrix."""
        first, last = span.start // self.columns, -(-span.stop // self.columns)
        wanted = self.codes.read(matrix * self.matrix_codes, (matrix + 1) * self.matrix_codes)
        codes = work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)
        skipped = matrix * self.matrix_codes * self.codes.bits % 8 // self.codes.bits
        (down, across), (left, right) = self._table, (first // self.across, -(-last // self.across))
        places = (matrix * down + np.arange(down)[:, None]) * across + np.arange(left, right)
        scales = self.scales.pick(places, work)
        zeros = None if self.zeros is None else self.zeros.pick(places, work)
        rows, columns = np.arange(first, last), np.arange(self.columns)
        rows_at, columns_at = self.row_step.find(rows), self.column_step.find(columns)
        row_scales, column_scales = rows // self.across - left, self._find_groups(down, work) * (right - left)
        given = _Given(codes, self.codes, self.codes.take_table(work), scales, zeros, 1.0, skipped)
        tables = (rows_at, row_scales, columns_at, column_scales)
        if native.load() is not None:
            pointers = [np.ascontiguousarray(each) for each in tables]
            inside = span.start - first * self.columns
            arrays = [each.ctypes.data for each in pointers]
            codes_given, alive = given.lower()
            found = (inside, span.size, self.columns, *arrays, out.ctypes.data)
            call_checked("dequantize_columns", ctypes.byref(codes_given), *found)
            del alive  # until here the structure points into it
        else:
            at = np.arange(span.start, span.stop)
            row, column = at // self.columns - first, at % self.columns
            given.fill(rows_at[row] + columns_at[column], row_scales[row] + column_scales[column], out)

    def _find_groups(self, down: int, work: Workspace) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the row of the table of scales for each column; `MergeError` for one that there is not."""
        if self.order is None:
            return np.arange(self.columns) // self.group
        (wanted,) = self.order.reads(Span(0, self.order.size))
        kind = "<i8" if self.order.dtype == "I64" else "<i4"
        found = work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes).view(kind).astype(np.int64)
        if found.min() < 0 or found.max() >= down:
            raise MergeError(
                f"{wanted.pin.url}: an index of groups (g_idx) names group {found.max()} or {found.min()} of {down}"
            )
        return found


@dataclass(frozen=True, slots=True)
class Stride:
    """Where codes lie along an axis: place k is at ``k // group · step + inner[k % group]``."""

    step: int
    group: int = 1
    inner: tuple[int, ...] = (0,)

    def find(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return where each of the places is."""
        inner: np.ndarray[Any, np.dtype[np.int64]] = np.array(self.inner)[places % self.group]
        return places // self.group * self.step + inner


@dataclass(frozen=True, slots=True)
class _Given:
    """What a slab is made of, once it is read."""

    raw: Arena
    codes: Codes
    table: Floats
    scales: Floats
    zeros: Floats | None
    factor: float
    skipped: int  # codes before the first, in its byte

    def lower(self) -> tuple[NativeCodes, Any]:
        """Return it as native loops take it, and what it points into."""
        arrays = [np.ascontiguousarray(each) for each in (self.table, self.scales)]
        zeros = None if self.zeros is None else np.ascontiguousarray(self.zeros)
        return NativeCodes(
            self.raw.ctypes.data,
            self.skipped,
            self.codes.bits,
            self.codes.high_first,
            *(each.ctypes.data for each in arrays),
            None if zeros is None else zeros.ctypes.data,
            self.factor,
        ), (self.raw, arrays, zeros)

    def fill(self, at: Any, scale_at: Any, out: Floats) -> None:
        """Fill in what has its codes and scales at these places."""
        at = at + self.skipped
        if self.codes.bits == 4:
            codes = self.raw[at >> 1] >> ((at & 1 ^ self.codes.high_first) << 2).astype(np.uint8) & 15
        else:
            codes = self.raw[at]
        with np.errstate(all="ignore"):
            np.take(self.table, codes, out=out)
            if self.zeros is not None:
                out -= self.zeros.reshape(-1)[scale_at]
            out *= self.scales.reshape(-1)[scale_at]
            if self.factor != 1.0:
                out *= np.float32(self.factor)

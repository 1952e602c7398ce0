"""Small tables of float32 beside quantised values: scales and zero points, in the ways in which they are stored.

They are picked by their place in the table, flat; what is stored is held for each task, and never read twice by it.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors.expressions import Read, Stored
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace

Floats = np.ndarray[Any, np.dtype[np.float32]]
Words = np.ndarray[Any, np.dtype[np.uint32]]
Places = slice | np.ndarray[Any, np.dtype[np.int64]]  # in a table, flat; a slice says both of its ends

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BEYOND = 3  # values of float32 that a picked number takes while it is made, as numpy goes about it


class Numbers:
    """A table of float32 that is made of what is stored."""

    __slots__ = ()

    def holds(self, places: slice) -> Iterator[Read]:
        """Yield what must be read for these places."""
        raise NotImplementedError

    def pick(self, places: Places, work: Workspace) -> Floats:
        """Return the numbers at these places, in the places' shape."""
        raise NotImplementedError

    def describe(self) -> Any:
        """Return what they depend on, as JSON."""
        raise NotImplementedError

    def pick_bytes(self, count: int) -> int:
        """An upper bound of what picking so many takes beside what is held."""
        return 4 * _BEYOND * count


@dataclass(frozen=True, slots=True)
class Listed(Numbers):
    """Stored one after the other, as floats, as whole numbers, or as exponents of 2 (``U8`` and ``F8_E8M0``)."""

    stored: Stored
    exponents: bool = False  # whether U8 is an exponent, as MX formats have it, and not a number

    def holds(self, places: slice) -> Iterator[Read]:
        """Yield the range of these places."""
        yield from self.stored.reads(Span(places.start, places.stop))

    def pick(self, places: Places, work: Workspace) -> Floats:
        """Return the numbers, decoded."""
        if isinstance(places, slice):
            return decode(_read(self.stored, places, work), self._kind)
        first, last = int(places.min()), int(places.max()) + 1
        return decode(_read(self.stored, slice(first, last), work), self._kind, places - first)

    @property
    def _kind(self) -> str:
        return "F8_E8M0" if self.exponents else self.stored.dtype

    def describe(self) -> Any:
        """What is stored."""
        return {"listed": self.stored.describe(), "exponents": self.exponents}


@dataclass(frozen=True, slots=True)
class Scaled(Numbers):
    """Numbers times, or over, one that all of them share."""

    numbers: Numbers
    by: Stored  # of one element
    divides: bool = False

    def holds(self, places: slice) -> Iterator[Read]:
        """Yield what both are read from."""
        yield from self.numbers.holds(places)
        yield from self.by.reads(Span(0, 1))

    def pick(self, places: Places, work: Workspace) -> Floats:
        """Return the numbers, in float32."""
        by = decode(_read(self.by, slice(0, 1), work), self.by.dtype)
        found = self.numbers.pick(places, work)
        with np.errstate(all="ignore"):
            made: Floats = found / by if self.divides else found * by
        return made

    def describe(self) -> Any:
        """Both."""
        return {"scaled": self.numbers.describe(), "by": self.by.describe(), "divides": self.divides}


@dataclass(frozen=True, slots=True)
class Nibbles(Numbers):
    """Whole numbers of 4 or 8 bits in words of 32, along one axis of a table ``[rows, columns]``, and something added.

    The axis of the words is cut into groups of as many as a word has; `order` says which of its places each has.
    """

    stored: Stored
    bits: int
    columns: int  # of the table
    along_rows: bool  # whether a word has the numbers of several rows, and not of several columns
    order: tuple[int, ...]  # the place in a word of each number of a group
    added: int = 0
    wraps: bool = False  # whether what is added leaves the bits that there are

    def holds(self, places: slice) -> Iterator[Read]:
        """Yield all of it: it is a hundredth of its weight."""
        yield from self.stored.reads(Span(0, self.stored.size))

    def pick(self, places: Places, work: Workspace) -> Floats:
        """Return the numbers, unpacked."""
        at = np.arange(places.start, places.stop) if isinstance(places, slice) else places
        words = _read(self.stored, slice(0, self.stored.size), work).view("<u4")
        row, column = at // self.columns, at % self.columns
        each, order = 32 // self.bits, np.array(self.order)
        if self.along_rows:
            word, place = row // each * self.columns + column, order[row % each]
        else:
            word, place = row * -(-self.columns // each) + column // each, order[column % each]
        found = (words[word] >> (self.bits * place).astype(np.uint32)).astype(np.int64) & ((1 << self.bits) - 1)
        found += self.added
        made: Floats = (found & ((1 << self.bits) - 1) if self.wraps else found).astype(np.float32)
        return made

    def describe(self) -> Any:
        """What is stored, and how."""
        how = [self.bits, self.columns, self.along_rows, list(self.order), self.added, self.wraps]
        return {"nibbles": self.stored.describe(), "how": how}

    def pick_bytes(self, count: int) -> int:
        """Places and words are twice as wide as floats, and there are several of them."""
        return 64 * count


@dataclass(frozen=True, slots=True)
class Nested(Numbers):
    """Scales that are quantised themselves (bitsandbytes): ``map[code] · scale of its block + offset``."""

    codes: Stored  # U8
    map: Stored  # 256 values
    scales: Stored  # one a block of codes
    block: int
    offset: float

    def holds(self, places: slice) -> Iterator[Read]:
        """Yield the codes, their blocks' scales and the map."""
        yield from self.codes.reads(Span(places.start, places.stop))
        yield from self.scales.reads(Span(places.start // self.block, -(-places.stop // self.block)))
        yield from self.map.reads(Span(0, self.map.size))

    def pick(self, places: Places, work: Workspace) -> Floats:
        """Return the scales."""
        if not isinstance(places, slice):
            raise TypeError("scales of blocks are picked in a row (a fault of mergemill)")
        codes = _read(self.codes, places, work)
        first = places.start // self.block
        scales = decode(
            _read(self.scales, slice(first, -(-places.stop // self.block)), work),
            self.scales.dtype,
            np.arange(places.start, places.stop) // self.block - first,
        )
        table = decode(_read(self.map, slice(0, self.map.size), work), self.map.dtype)
        with np.errstate(all="ignore"):
            return table[codes] * scales + np.float32(self.offset)

    def describe(self) -> Any:
        """What it is made of."""
        stored = [each.describe() for each in (self.codes, self.map, self.scales)]
        return {"nested": stored, "block": self.block, "offset": self.offset}

    def pick_bytes(self, count: int) -> int:
        """Codes, places, scales and the sum."""
        return 32 * count


def decode(raw: Arena, dtype: str, places: Any = slice(None)) -> Floats:
    """Return bytes of `dtype` as float32: all of them, or those at some places.

    By `take`, which needs a fifth of the time of indices in brackets.
    """
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8"):
        found: Floats = find_table(dtype).take(_pick(raw, places))
        return found
    if dtype == "BF16":
        words: Words = _pick(raw.view("<u2"), places).astype(np.uint32) << 16
        return words.view(np.float32)
    kinds: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I32": "<i4", "I64": "<i8"}
    with np.errstate(all="ignore"):
        return np.array(_pick(raw.view(kinds[dtype]), places), np.float32)


def _pick(values: Any, places: Any) -> Any:
    return values[places] if isinstance(places, slice) else values.take(places)


NUMBER_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I32", "I64")


@functools.cache
def find_table(kind: str) -> Floats:
    """Return what each code of a kind stands for: 256 values, or 16."""
    codes = np.arange(256)
    if kind == "I8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    if kind == "E2M1":
        return np.array([*E2M1, *(-each for each in E2M1)], np.float32)
    if kind.startswith("U"):  # U4 and U8; U4-8 is less 8
        bits, _, less = kind[1:].partition("-")
        return (np.arange(1 << int(bits)) - int(less or 0)).astype(np.float32)
    if kind == "F8_E8M0":
        with np.errstate(all="ignore"):
            return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype(np.float32)
    exponent_bits, bias = {"F8_E4M3": (4, 7), "F8_E5M2": (5, 15)}[kind]
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = codes >> mantissa_bits & ((1 << exponent_bits) - 1), codes & ((1 << mantissa_bits) - 1)
    small = np.ldexp(mantissa * 2.0**-mantissa_bits, 1 - bias)
    found = np.where(exponent == 0, small, np.ldexp(1 + mantissa * 2.0**-mantissa_bits, exponent - bias))
    if kind == "F8_E4M3":
        found = np.where((codes & 127) == 127, np.nan, found)
    else:
        found = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), found)
    return np.where(codes > 127, -found, found).astype(np.float32)


def _read(stored: Stored, places: slice, work: Workspace) -> Arena:
    (wanted,) = stored.reads(Span(places.start, places.stop))
    return work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)

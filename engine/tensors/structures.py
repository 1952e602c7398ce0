"""The structures that Python hands to native loops, as slab.h has them, and the check that the library agrees.

A library that was built from other sources would read and write where it should not: it says its version, and the size
and the offsets of every structure, and is refused where any of them differs. A test holds that another signature or
structure has another version.
"""

import ctypes
import itertools
from collections.abc import Iterator

VERSION = 20  # as native.h has it


class NativeDerived(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("least", ctypes.c_void_p),
        ("span", ctypes.c_void_p),
        ("divergences", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


class NativeSlab(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("has_base", ctypes.c_int32),
        ("size", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("derived", ctypes.c_void_p),
    ]


class NativeCut(ctypes.Structure):
    _fields_ = [("threshold", ctypes.c_float), ("block", ctypes.c_int64), ("ties", ctypes.c_int64)]


class NativeKeep(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("cut", NativeCut),
        ("outliers", NativeCut),
        ("has_outliers", ctypes.c_int32),
        ("limit", ctypes.c_int32),
        ("keys", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("outlier_rank", ctypes.c_int64),
    ]


class NativeJoin(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("divisor", ctypes.c_float),
        ("lambda_", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("votes", ctypes.c_float),
        ("masks", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("line_count", ctypes.c_int64),
        ("by_row", ctypes.c_int32),
    ]


class NativeWindow(ctypes.Structure):
    _fields_ = [
        ("which", ctypes.c_int64),
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("above", ctypes.c_int64),
        ("inside", ctypes.c_int64),
        ("low_counts", ctypes.c_void_p),
        ("high_counts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("room", ctypes.c_int64),
    ]


class NativeRank(ctypes.Structure):
    _fields_ = [
        ("which", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("share", ctypes.c_double),
        ("key", ctypes.c_uint32),
        ("above", ctypes.c_int64),
        ("ties", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("block_ties", ctypes.c_int64),
    ]


class NativeCodes(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("skipped", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("high_first", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("factor", ctypes.c_float),
    ]


class NativeCoded(ctypes.Structure):
    _fields_ = [
        ("codes", NativeCodes),
        ("start", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_codes", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_columns", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("code_count", ctypes.c_int64),
        ("scale_count", ctypes.c_int64),
    ]


class NativeFactor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("size", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("along_side", ctypes.c_int64),
        ("along_rank", ctypes.c_int64),
        ("along_matrix", ctypes.c_int64),
    ]


class NativeAdapted(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("start", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("left", NativeFactor),
        ("right", NativeFactor),
        ("room", ctypes.c_void_p),
        ("floats", ctypes.c_int64),
        ("there", ctypes.c_void_p),
    ]


STRUCTURES = (
    NativeSlab,
    NativeDerived,
    NativeCut,
    NativeKeep,
    NativeJoin,
    NativeWindow,
    NativeRank,
    NativeCodes,
    NativeCoded,
    NativeFactor,
    NativeAdapted,
)


def find_layout() -> tuple[int, ...]:
    """Return the version, and for each structure its size and where its fields begin, as the library should have it."""
    return (
        VERSION,
        *itertools.chain.from_iterable(map(_iterate_offsets, STRUCTURES)),
    )


def _iterate_offsets(kind: type[ctypes.Structure]) -> Iterator[int]:
    yield ctypes.sizeof(kind)
    yield from (getattr(kind, field[0]).offset for field in kind._fields_)

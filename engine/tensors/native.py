"""The loops of ``native.c``: what torch has no single operation for, at the speed of memory, without Python's lock.

They are built where the package is installed, if there is a C compiler. Where there is none, or a slab is not flat
float32 on the CPU, the same is done by several operations of torch: slower, with the same bits (the tests compare).
``MERGEMILL_NATIVE=0`` leaves the library unused.
"""

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergemill.engine.errors import UnfitSystem
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch
from mergemill.engine.tensors.structures import find_layout

Floats = np.ndarray[Any, np.dtype[np.float32]]
Sums = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

LANES = 32  # sums of a block that are left to add

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_FLOAT, _FLAG, _WORD = ctypes.c_float, ctypes.c_int32, ctypes.c_uint32
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "combine": ([_POINTER, _POINTER, _SIZE, _SIZE, _FLOAT], None),
    "add_deltas": ([_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _FLOAT], None),
    "add_agreeing": ([_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLAG, _FLOAT], None),
    "keep_large": ([_POINTER, _SIZE, _FLOAT, _FLAG], None),
    "keep_random": ([_POINTER, _POINTER, _SIZE, _WORD, _WORD, _FLAG], None),
    "count_first": ([_POINTER, _SIZE, _WORD, _FLAG, _POINTER, _WORD], None),
    "count_within": ([_POINTER, _SIZE, _WORD, _FLAG, _POINTER, _WORD], None),
    "count_equal": ([_POINTER, _SIZE, _FLOAT], _SIZE),
    "sum_absolute": ([_POINTER, _SIZE, _SIZE, _POINTER], None),
    "count_broken": ([_POINTER, _SIZE, ctypes.c_uint16], _SIZE),
    "look": ([_POINTER, _SIZE, _SIZE, _SIZE, _FLAG, _SIZE, _POINTER, _POINTER], None),
    "compare": ([_POINTER, _SIZE, _SIZE, _POINTER, _POINTER], None),
    "sum_products": ([_POINTER, _POINTER, _SIZE, _SIZE, _POINTER], None),
    "fill_counters": ([], None),
    "plain_floats": ([_POINTER], _FLAG),
    "restore_floats": ([ctypes.c_uint64], None),
    "merge_stored": ([_POINTER, _SIZE, *[_POINTER] * 3, _FLAG, _POINTER, _SIZE, _POINTER], _FLAG),
    "subtract_stored": ([_POINTER, _FLAG, _POINTER, _FLAG, _SIZE, _POINTER], _FLAG),
    "stored_products": ([_POINTER, _POINTER, _SIZE], _FLAG),
    "stored_norms": ([_POINTER, _SIZE, _POINTER, _POINTER, _POINTER], _FLAG),
    "stored_marked_squares": ([_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE], _FLAG),
    "stored_sample": ([_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER], _FLAG),
    "stored_windows": ([_POINTER, _POINTER, _SIZE], _FLAG),
    "stored_ranks": ([_POINTER, _POINTER, _SIZE, _POINTER, _SIZE], _FLAG),
    "find_cuts": ([_POINTER, _SIZE, _POINTER, _POINTER, _SIZE], _FLAG),
    "stored_upper": ([_POINTER, _POINTER, _POINTER, _SIZE], _FLAG),
    "stored_lower": ([_POINTER, _SIZE, _WORD, _POINTER], _FLAG),
    "stored_equal": ([_POINTER, _SIZE, _FLOAT, _POINTER], _FLAG),
    "stored_rows": ([_POINTER, _SIZE, _SIZE, *[_POINTER] * 5], _FLAG),
    "stored_changes": ([_POINTER, _FLOAT, _POINTER], _FLAG),
    "stored_compared": ([_POINTER, _FLAG, _SIZE, _POINTER, _POINTER, _SIZE, *[_POINTER] * 3], _FLAG),
    "stored_extremes": ([_POINTER, _POINTER], _FLAG),
    "stored_columns": ([_POINTER, _SIZE, ctypes.c_double, _POINTER], _FLAG),
    "stored_row_squares": ([_POINTER, _SIZE, ctypes.c_double, _SIZE, _POINTER], _FLAG),
    "stored_divergences": ([_POINTER, _SIZE, _POINTER], _FLAG),
    "dequantize_rows": ([_POINTER, _SIZE, _POINTER], _FLAG),
    "dequantize_columns": ([_POINTER, *[_SIZE] * 3, *[_POINTER] * 5], _FLAG),
    "decode_blocks": ([_FLAG, _POINTER, *[_SIZE] * 3, _POINTER], _FLAG),
    "stored_marks": ([_POINTER, _SIZE, _POINTER, _POINTER, _POINTER], _FLAG),
    "decode": ([_POINTER, _FLAG, _SIZE, _POINTER], _FLAG),
    "pursuit_bytes": ([_SIZE] * 3, _SIZE),
    "pursue": ([_POINTER, _FLAG, *[_SIZE] * 3, _POINTER, _FLAG, ctypes.c_double, *[_POINTER] * 5], _SIZE),
    "read_ranges": ([_FLAG, *[_POINTER] * 3, _SIZE, _SIZE, *[_POINTER] * 3], _SIZE),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library; None where it was not built or is not wanted."""
    if os.environ.get("MERGEMILL_NATIVE") == "0":
        return None
    for ending in sorted(importlib.machinery.EXTENSION_SUFFIXES, key=lambda each: ".abi3" not in each):
        path = Path(__file__).with_name(f"_native{ending}")
        if path.exists():
            return declare(ctypes.CDLL(str(path)), path)
    return None


def find_absence() -> str:
    """Return why the library is not used, and what would change that; empty where it is used."""
    if os.environ.get("MERGEMILL_NATIVE") == "0":
        return "MERGEMILL_NATIVE=0"
    return "" if load() else "not built; install a C compiler, and mergemill again"


def declare(library: ctypes.CDLL, path: str | Path) -> ctypes.CDLL:
    """Return the library once it agrees with what is handed to it; else raise UnfitSystem."""
    expected = find_layout()
    found = (ctypes.c_int64 * len(expected))()
    if not hasattr(library, "mergemill_layout") or not _lays_out(library, found) or tuple(found) != expected:
        raise UnfitSystem(f"{path}: was built from other sources (its structures differ); install mergemill again")
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(library, f"mergemill_{name}", None)
        if function is None:
            raise UnfitSystem(f"{path}: was built from other sources (it has no {name}); install mergemill again")
        function.argtypes, function.restype = arguments, result
    library.mergemill_fill_counters()
    return library


def _lays_out(library: ctypes.CDLL, out: Any) -> bool:
    """Whether as much is said of the library's structures as `out` has room for, and fill it in."""
    library.mergemill_layout.argtypes, library.mergemill_layout.restype = [_POINTER, _SIZE], _SIZE
    return int(library.mergemill_layout(out, len(out))) == len(out)


def suits(*slabs: Tensor) -> bool:
    """Whether the library is there and can work on these slabs."""
    return load() is not None and all(_is_plain(slab, torch.float32) for slab in slabs)


def suits_integers(bits: Tensor) -> bool:
    """Whether the library is there and can count these, as int32."""
    return load() is not None and _is_plain(bits, torch.int32)


def suits_halves(written: Tensor) -> bool:
    """Whether the library is there and can count these, as float16 or bfloat16."""
    return load() is not None and (_is_plain(written, torch.bfloat16) or _is_plain(written, torch.float16))


def _is_plain(slab: Tensor, dtype: Dtype) -> bool:
    return slab.dtype == dtype and slab.is_contiguous() and slab.device.type == "cpu"


def combine(slabs: Sequence[Tensor], weight: Sequence[float], divisor: float = 0.0) -> Tensor:
    """Write ``sum(weight[i] · slabs[i])``, over `divisor` where that is not 0, into the first slab."""
    call("combine", _pointers(slabs), _floats(weight), len(slabs), slabs[0].numel(), divisor)
    return slabs[0]


def add_deltas(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, divisor: float, lambda_: float
) -> Tensor:
    """Add ``lambda · sum(weight[i] · deltas[i])``, over `divisor` where that is not 0, to the base."""
    size = base.numel()
    call("add_deltas", base.data_ptr(), _pointers(deltas), _floats(weight), len(deltas), size, divisor, lambda_)
    return base


def add_agreeing(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, normalize: bool, lambda_: float
) -> Tensor:
    """Add ``lambda ·`` the sum of the weighted deltas that have the sign of the sum of all of them to the base."""
    size = base.numel()
    call("add_agreeing", base.data_ptr(), _pointers(deltas), _floats(weight), len(deltas), size, normalize, lambda_)
    return base


def keep_large(slab: Tensor, threshold: float, *, inclusive: bool) -> None:
    """Multiply what is not above the threshold in magnitude by 0; `inclusive` keeps what equals it."""
    call("keep_large", slab.data_ptr(), slab.numel(), threshold, inclusive)


def keep_random(slab: Tensor, counters: Tensor, first: int, second: int, limit: int) -> None:
    """Multiply the elements whose random number, from its counter and two keys, is not under `limit` by 0."""
    call("keep_random", slab.data_ptr(), counters.data_ptr(), slab.numel(), _word(first), _word(second), limit)


def count_first(ordered: Tensor, bias: int, shift: int, bins: int) -> Counts:
    """Count the bits from `shift` on of int32 that are made unsigned by adding `bias`."""
    counts = np.zeros(bins, np.int64)
    call("count_first", ordered.data_ptr(), ordered.numel(), _word(bias), shift, counts.ctypes.data, bins)
    return counts


def count_within(ordered: Tensor, low: int, span: int, shift: int) -> Counts:
    """Count ``(x - low) >> shift`` of the int32 for which ``0 <= x - low < span``, modulo 2**32."""
    counts = np.zeros(span >> shift, np.int64)
    call("count_within", ordered.data_ptr(), ordered.numel(), _word(low), shift, counts.ctypes.data, len(counts))
    return counts


def count_equal(slab: Tensor, value: float) -> int:
    """Count the elements that equal `value`."""
    return int(call("count_equal", slab.data_ptr(), slab.numel(), value))


def sum_absolute(slab: Tensor, block: int, cuts: int) -> Sums:
    """Return 32 sums of |x| in float64 for each of the slab's `cuts`."""
    sums = np.empty((cuts, LANES))
    call("sum_absolute", slab.data_ptr(), slab.numel(), block, sums.ctypes.data)
    return sums


def sum_products(left: Tensor, right: Tensor, block: int, cuts: int) -> Sums:
    """Return 32 sums of products in float64 for each of the slabs' `cuts`."""
    sums = np.empty((cuts, LANES))
    call("sum_products", left.data_ptr(), right.data_ptr(), left.numel(), block, sums.ctypes.data)
    return sums


def count_broken(written: Tensor) -> int:
    """Count the infinities and NaN of a flat slab of float16 or bfloat16."""
    mask = 0x7F80 if written.dtype == torch.bfloat16 else 0x7C00
    return int(call("count_broken", written.data_ptr(), written.numel(), mask))


def look(slabs: Sequence[Tensor], block: int, samples: Floats, sums: Sums, *, subtract: bool) -> None:
    """Keep the sample of the first slab, ``[chunk, SAMPLE]``, and fill `sums`, a row for each slab."""
    size, chunks = slabs[0].numel(), sums.shape[1]
    pointers = _pointers(slabs)
    call("look", pointers, len(slabs), size, block, subtract, chunks, samples.ctypes.data, sums.ctypes.data)


def compare(slab: Tensor, block: int, samples: Floats, sums: Sums) -> None:
    """Fill `sums`, one for each chunk, with the squares of the slab's differences to the samples."""
    call("compare", slab.data_ptr(), slab.numel(), block, samples.ctypes.data, sums.ctypes.data)


def plain_floats() -> tuple[bool, int]:
    """Have this thread round to nearest and keep denormals; returns whether it did, and what `restore_floats` takes."""
    before = ctypes.c_uint64()
    was_plain = bool(call("plain_floats", ctypes.byref(before)))
    return was_plain, before.value


def restore_floats(before: int) -> None:
    """Have this thread compute as it did before `plain_floats`."""
    call("restore_floats", before)


def call(name: str, *arguments: Any) -> Any:
    """Call a loop of the library, which must be there."""
    return getattr(load(), f"mergemill_{name}")(*arguments)


def _pointers(slabs: Sequence[Tensor]) -> Any:
    return (_POINTER * len(slabs))(*(slab.data_ptr() for slab in slabs))


def _floats(values: Sequence[float]) -> Any:
    return (_FLOAT * len(values))(*values)


def _word(value: int) -> int:
    return value & 0xFFFFFFFF

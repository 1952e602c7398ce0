"""Pursuits of one target after the other by a native loop (``pursuit.c``), in a room that is made once."""

import os

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.stored import STORED_DTYPES

Doubles = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def count_room_bytes(rows: int, width: int, terms: int) -> int:
    """Return an upper bound of what a pursuit works in, with the loop or without it."""
    return 8 * (terms * (width + terms) + 10 * width) + (2 * terms + 16) * rows + 1024 * (terms + 4)


class Pursuer:
    """Chooses among rows, ``[rows, width]``, at most `terms` for a target."""

    def __init__(self, rows: Tensor, lengths: Floats, file: int, terms: int, unsure: float) -> None:
        """Take rows as they are stored, which nobody changes meanwhile, and what is known of them.

        lengths: of the rows, NaN for those that are none; file: a descriptor, of int16, the products of all rows with
        all over their lengths, times 32767; unsure: the share of lengths within which sums of products are known.
        """
        codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        self.held = rows, lengths
        self.terms = terms
        self.room = np.empty(native.call("pursuit_bytes", *rows.shape, terms), np.uint8)
        sizes = STORED_DTYPES[codes[rows.dtype]], *rows.shape, terms
        self.given = rows.data_ptr(), *sizes, lengths.ctypes.data, file, unsure, self.room.ctypes.data

    def pursue(self, target: Doubles, start: Floats) -> tuple[Numbers, Doubles]:
        """Return the numbers of the rows of a target, in the order in which they were taken, and their weights.

        start: the products of the target with the rows over their lengths, ``[rows]``. Raises OSError.
        """
        numbers, weights = np.empty(self.terms, np.int64), np.empty(self.terms)
        pointers = (each.ctypes.data for each in (target, start, numbers, weights))
        count = native.call("pursue", *self.given, *pointers)
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return numbers[:count], weights[:count]

"""The cosines of all rows with all, in a file without a name that goes when nobody has it, or its process ends.

It lies in the folder for temporary files (`TMPDIR`), 2 bytes for each pair of rows: 1.8 GB for 30,000 of them, more
than a worker may take of memory.
"""

import errno
import os
import tempfile
import threading
import weakref

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.tensors.lazy import Tensor, torch

ONE = 32767  # what a cosine of 1 is stored as
_SIDE = 1024  # rows of a tile
_ITEM_BYTES = 2
SLICE = 256  # of a row's width that is summed by itself: so rounding leaves fewer rows that may be the best

Cosines = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


def count_gram_bytes(rows: int) -> int:
    """Return the size of the file."""
    return _ITEM_BYTES * rows * rows


def count_filling_bytes(width: int) -> int:
    """Return an upper bound of what making it takes of memory."""
    return 8 * _SIDE * (3 * width + 2 * _SIDE)


class GramFile:
    """Rows of X Xᵀ, of rows of length 1 or 0, by number, as whole multiples of 1 / `ONE`.

    The tasks of a process share it, and fill it together. It is closed when nobody has it any more.
    """

    def __init__(self, count: int) -> None:
        """count: of the rows."""
        self.count = count
        try:
            with tempfile.TemporaryFile(buffering=0) as file:
                self.descriptor = os.dup(file.fileno())
        except OSError as error:
            raise RunError(
                f"no file can be made for the {count_gram_bytes(count)} bytes that matching pursuit keeps beside "
                f"its memory: {error}; TMPDIR names another folder"
            ) from error
        weakref.finalize(self, os.close, self.descriptor)
        self._left = list(range(0, count, _SIDE))[::-1]  # rows at which tiles begin that nobody has made yet
        self._busy = 0  # tasks that make some now
        self._changed = threading.Condition()

    def read(self, number: int, out: Cosines) -> None:
        """Read a row into `out`, ``[rows]``; raises OSError."""
        raw, start = out.view(np.uint8).data, number * self.count * _ITEM_BYTES
        while raw:
            got = os.preadv(self.descriptor, [raw], start)
            if not got:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            raw, start = raw[got:], start + got

    def fill(self, rows: Tensor, inverse: Tensor) -> None:
        """Make what is not there yet, with whoever else does, and return when all of it is there.

        rows: ``[rows, width]``; inverse: what they are multiplied with to be of length 1, ``[rows]``. What one task
        could not make is the others' again.
        """
        while (top := self._take()) is not None:
            try:
                self._fill_from(top, rows, inverse)
            except BaseException:
                self._give_back(top)
                raise
            self._give_back(None)

    def _take(self) -> int | None:
        """Return rows to make; None when all are made."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or not self._busy)
            if not self._left:
                return None
            self._busy += 1
            return self._left.pop()

    def _give_back(self, top: int | None) -> None:
        with self._changed:
            self._busy -= 1
            if top is not None:
                self._left.append(top)
            self._changed.notify_all()

    def _fill_from(self, top: int, rows: Tensor, inverse: Tensor) -> None:
        """Write tile by tile: what is above the diagonal is also what is below."""
        tile = torch.empty(_SIDE, _SIDE)
        upper = unit_rows(rows, inverse, top, _SIDE) * ONE
        for left in range(top, self.count, _SIDE):
            right = unit_rows(rows, inverse, left, _SIDE)
            whole = multiply(upper, right, tile[: len(upper), : len(right)])
            cosines = whole.round_().clamp_(-ONE, ONE).to(torch.int16)
            self._write(cosines, top, left)
            if left > top:
                self._write(cosines.T.contiguous(), left, top)

    def _write(self, cosines: Tensor, top: int, left: int) -> None:
        for i, line in enumerate(cosines.numpy(), top):
            try:
                whole = os.pwrite(self.descriptor, line, (i * self.count + left) * _ITEM_BYTES) == line.nbytes
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise
                whole = False
            if not whole:
                raise RunError(
                    f"{tempfile.gettempdir()}: has no room for the {count_gram_bytes(self.count)} bytes that matching "
                    "pursuit keeps beside its memory; TMPDIR names another folder"
                )


def multiply(one: Tensor, other: Tensor, out: Tensor) -> Tensor:
    """Return the products of rows with rows in `out`, summed slice by slice of the width."""
    for first in range(0, one.shape[1], SLICE):
        here = slice(first, first + SLICE)
        torch.addmm(out, one[:, here], other[:, here].T, beta=min(first, 1), out=out)
    return out


def count_summed(width: int) -> int:
    """Return how many numbers are added one after the other at most, by which the rounding of a product is bounded."""
    return min(width, SLICE) + -(-width // SLICE)


def unit_rows(rows: Tensor, inverse: Tensor, first: int, count: int) -> Tensor:
    """Return some rows with the length 1, float32; those whose inverse is 0 are zeros, whatever is in them."""
    here = rows[first : first + count].float() * inverse[first : first + count, None]
    return here.nan_to_num_(0.0, 0.0, 0.0)

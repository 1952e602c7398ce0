"""The cosines of all rows with all, in a file without a name that goes when it is closed, or its process ends.

It lies in the folder for temporary files (`TMPDIR`), 2 bytes for each pair of rows: 1.8 GB for 30,000 of them, more
than a worker may take of memory.
"""

import errno
import os
import tempfile
from types import TracebackType
from typing import Self

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.tensors.lazy import Tensor, torch

ONE = 32767  # what a cosine of 1 is stored as
_SIDE = 1024  # rows of a tile
_ITEM_BYTES = 2

Cosines = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


def count_gram_bytes(rows: int) -> int:
    """Return the size of the file."""
    return _ITEM_BYTES * rows * rows


def count_filling_bytes(width: int) -> int:
    """Return an upper bound of what making it takes of memory."""
    return 8 * _SIDE * (3 * width + 2 * _SIDE)


class GramFile:
    """Rows of X Xᵀ, of rows of length 1 or 0, by number, as whole multiples of 1 / `ONE`."""

    def __init__(self, rows: Tensor, inverse: Tensor) -> None:
        """rows: ``[rows, width]``; inverse: what they are multiplied with to be of length 1, ``[rows]``."""
        self._count = len(rows)
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it is closed by whoever has this)
        except OSError as error:
            raise RunError(
                f"no file can be made for the {count_gram_bytes(len(rows))} bytes that matching pursuit keeps beside "
                f"its memory: {error}; TMPDIR names another folder"
            ) from error
        try:
            self._fill(rows, inverse)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """The file is gone when the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._file.close()

    def read(self, number: int, out: Cosines) -> None:
        """Read a row into `out`, ``[rows]``."""
        raw, start = out.view(np.uint8).data, number * self._count * _ITEM_BYTES
        while raw:
            got = os.preadv(self._file.fileno(), [raw], start)
            raw, start = raw[got:], start + got

    def _fill(self, rows: Tensor, inverse: Tensor) -> None:
        """Write tile by tile: what is above the diagonal is also what is below."""
        tile = torch.empty(_SIDE, _SIDE)
        for top in range(0, self._count, _SIDE):
            upper = unit_rows(rows, inverse, top, _SIDE) * ONE
            for left in range(top, self._count, _SIDE):
                right = unit_rows(rows, inverse, left, _SIDE)
                whole = torch.mm(upper, right.T, out=tile[: len(upper), : len(right)])
                cosines = whole.round_().clamp_(-ONE, ONE).to(torch.int16)
                self._write(cosines, top, left)
                if left > top:
                    self._write(cosines.T.contiguous(), left, top)

    def _write(self, cosines: Tensor, top: int, left: int) -> None:
        for i, line in enumerate(cosines.numpy(), top):
            try:
                whole = os.pwrite(self._file.fileno(), line, (i * self._count + left) * _ITEM_BYTES) == line.nbytes
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise
                whole = False
            if not whole:
                raise RunError(
                    f"{tempfile.gettempdir()}: has no room for the {count_gram_bytes(self._count)} bytes that matching "
                    "pursuit keeps beside its memory; TMPDIR names another folder"
                )


def unit_rows(rows: Tensor, inverse: Tensor, first: int, count: int) -> Tensor:
    """Return some rows with the length 1, float32; those whose inverse is 0 are zeros, whatever is in them."""
    here = rows[first : first + count].float() * inverse[first : first + count, None]
    return here.nan_to_num_(0.0, 0.0, 0.0)

"""Normal random rows, keyed by seed, tensor and row: the same whoever makes them, and with whom.

Decided 2026-11-29: a Philox generator of NumPy's for each row, whose key is a BLAKE2b of the three.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def make_normals(seed: int, tensor: str, rows: Sequence[int], width: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return N(0, 1) for each of the output's rows that are named, ``[rows, width]``.

    >>> (make_normals(1, "a", [3, 5], 4)[1] == make_normals(1, "a", [5], 4)[0]).all()
    np.True_
    """
    found = np.empty((len(rows), width))
    for place, row in enumerate(rows):
        key = hashlib.blake2b(f"{seed}\0{tensor}\0{row}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        found[place] = generator.standard_normal(width)
    return found

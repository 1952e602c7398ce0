"""Many ranges of a file, each read to its own place in memory by one call: rows in the order of another vocabulary.

A row of 8 KiB that the system holds takes a few microseconds, and Python as much again for each (2026-11-30), so the
loop is native. A disk is asked for what lies around a row as well, since the rows beside it are wanted by other slabs:
16 times fewer requests. That ends once a process asked for twice the file: then memory does not hold it.
"""

import ctypes
from typing import Any

import numpy as np

from mergemill.engine.storage.ranges import Pin, read_each, read_with
from mergemill.engine.tensors import native

Places = np.ndarray[Any, np.dtype[np.int64]]
Room = np.ndarray[Any, np.dtype[np.uint8]]

AROUND_BYTES = 128 << 10
MOST_ASKED = 2  # times the file's size


def read_ranges(pin: Pin, offsets: Places, places: Places, sizes: Places, into: Room) -> None:
    """Fill `sizes[i]` bytes of `into` from `places[i]` on with those of a file of this machine from `offsets[i]` on."""
    library = native.load()
    if library is None:
        raw = into.data
        targets = (raw[at : at + size] for at, size in zip(places.tolist(), sizes.tolist(), strict=True))
        read_each(pin, offsets.tolist(), targets)
        return
    if not (int(places.min(initial=0)) >= 0 and int((places + sizes).max(initial=0)) <= len(into)):
        raise ValueError(f"ranges reach beyond the {len(into)} bytes that they are read into")
    given = [np.ascontiguousarray(each, np.int64) for each in (offsets, places, sizes)]

    def read(descriptor: int, asked_bytes: int) -> tuple[int, int, int]:
        window = AROUND_BYTES if asked_bytes < MOST_ASKED * pin.size_bytes else 1
        asked, error = ctypes.c_int64(), ctypes.c_int32()
        pointers = [each.ctypes.data for each in given]
        rest = (len(sizes), window, into.ctypes.data, ctypes.byref(asked), ctypes.byref(error))
        done = library.mergemill_read_ranges(descriptor, *pointers, *rest)
        if done == len(sizes):
            return asked.value, 0, 0
        return asked.value, error.value, int(offsets[done])

    read_with(pin, read)

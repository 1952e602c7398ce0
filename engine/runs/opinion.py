"""A second opinion on a shard: what the safetensors library itself finds in it, beside what we wrote."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergemill.engine.checkpoint.layout import DTYPE_BITS
from mergemill.engine.errors import VerifyError
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.storage.ranges import Pin, is_remote, read_into
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.workspace import bytes_of

ROW_BYTES = 4 << 20  # of a tensor's first axis, above which none of its values are read


@own_modes()
def check_by_library(pin: Pin, header: bytes, storage: Storage) -> None:
    """Raise `VerifyError` unless the library finds the header's tensors, and in those on a disk the values we find.

    header: the shard's first bytes, which were checked. Of each tensor on a disk the first and the last entry of its
    first axis are compared. Of a shard elsewhere the library is given the header alone, before a hole of its size.
    """
    from safetensors import SafetensorError, safe_open

    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    with _as_file(pin, header) as path:
        try:
            with safe_open(path, framework="pt") as file:
                if sorted(file.keys()) != sorted(entries):
                    raise VerifyError(f"{pin.url}: safetensors finds other tensors in it than were written")
                for name, entry in entries.items():
                    _check_tensor(file.get_slice(name), name, entry, pin, len(header), storage)
        except SafetensorError as error:
            raise VerifyError(f"{pin.url}: safetensors does not read it: {error}") from error


@contextmanager
def _as_file(pin: Pin, header: bytes) -> Iterator[str]:
    if not is_remote(pin.url):
        yield pin.url
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(pin.size_bytes)
        yield str(path)


def _check_tensor(found: Any, name: str, entry: Mapping[str, Any], pin: Pin, data_bytes: int, storage: Storage) -> None:
    shape = list(entry["shape"])
    if (found.get_dtype(), found.get_shape()) != (entry["dtype"], shape):
        raise VerifyError(f"{pin.url}: safetensors finds {name} as {found.get_dtype()} of {found.get_shape()}")
    row_bytes = math.prod(shape[1:]) * DTYPE_BITS[entry["dtype"]] // 8
    if is_remote(pin.url) or not shape or not shape[0] or not 0 < row_bytes <= ROW_BYTES:
        return
    for row in dict.fromkeys((0, shape[0] - 1)):
        ours = bytearray(row_bytes)
        read_into(pin, data_bytes + entry["data_offsets"][0] + row * row_bytes, memoryview(ours), storage)
        if bytes_of(found[row : row + 1]).tobytes() != bytes(ours):
            raise VerifyError(f"{pin.url}: safetensors finds other values in {name} than lie there")

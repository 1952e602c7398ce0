"""Large values that many tasks share, sent once a run: what a spec holds of them is their digests.

A map of rows is 1 MiB for 256k tokens and would stand in every task of an embedding and a head: 64 of them took 62.5
MiB, and now take 20 kB and one constant of 1 MiB (measured and decided 2026-11-29). A constant is a task that the
others depend on, so it goes once through the scheduler, and from worker to worker.
"""

import copyreg
import io
import pickle
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

from dask.delayed import Delayed, delayed

from mergemill.engine.tensors.row_maps import RowMap
from mergemill.engine.transplants.changes import Changes

Constant: TypeAlias = RowMap | Changes

_HERE = threading.local()


class Packing:
    """Pickles the specs of a run's tasks, and makes a task of each constant that they share."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._tasks: dict[str, Delayed] = {}

    def pack(self, value: Any) -> tuple[bytes, list[Delayed] | None]:
        """Return a value pickled, and the constants that it needs to be unpacked; None where it needs none."""
        found: dict[str, Constant] = {}

        def leave_out(constant: Constant) -> tuple[Any, tuple[str]]:
            found[constant.digest] = constant
            return find_constant, (constant.digest,)

        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = {**copyreg.dispatch_table, RowMap: leave_out, Changes: leave_out}
        pickler.dump(value)
        return buffer.getvalue(), [self._make_task(each) for each in found.values()] or None

    def _make_task(self, constant: Constant) -> Delayed:
        if constant.digest not in self._tasks:
            key = f"constant-{constant.digest[:16]}-{self._token}"
            self._tasks[constant.digest] = _later_load(pickle.dumps(constant), dask_key_name=key)
        return self._tasks[constant.digest]


def unpack(spec: bytes, constants: Sequence[Constant] | None) -> Any:
    """Return the value that `Packing.pack` took."""
    _HERE.constants = {constant.digest: constant for constant in constants or ()}
    try:
        return pickle.loads(spec)
    finally:
        _HERE.constants = {}


def find_constant(digest: str) -> Constant:
    """Return the constant of a digest, for what is being unpacked in this thread."""
    constant: Constant = _HERE.constants[digest]
    return constant


def _load(constant: bytes) -> Constant:
    found: Constant = pickle.loads(constant)
    return found


_later_load = delayed(_load, pure=False)

"""Storage for measurements alone: ``far://``, files of this machine behind a network; ``drop://``, which keeps nothing.

A far file answers after a latency, at the bandwidth of one process. An output at ``drop://`` has its record, journal,
index and the sizes of its shards in a folder, as on a shared disk; the bytes of parts are counted and forgotten. Both
count per process, in files that any process may read. Workers find ``far://`` by importing this module, as `settings`
has Dask do.
"""

import functools
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from distributed import Worker, WorkerPlugin
from fsspec import AbstractFileSystem

from mergemill.engine.plan.values import Part, Plan
from mergemill.engine.recipe.access import ALLOWED
from mergemill.engine.runs.outputs import output
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.receipts import Receipt, Upload
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.workspace import Arena

CLOCKS = "MERGEMILL_BENCH_CLOCKS"  # the variable that names a folder for what `TaskClock` counts
FIELDS = ("calls", "bytes", "busy_us", "in_flight", "most_in_flight")
_lock = threading.Lock()
_free_s = 0.0  # when this process's network has moved all that was asked of it


@contextmanager
def settings() -> Iterator[Mapping[str, Any]]:
    """Have merges of this process write to ``drop://``, and yield what Dask must be set to for their workers."""
    before = output._find_remote

    def find(scheme: str, place: str, storage: Storage, *, public: bool) -> output.Output:
        return DropOutput(place) if scheme.startswith("drop") else before(scheme, place, storage, public=public)

    output._find_remote = find
    try:
        yield {"distributed.worker.preload": [__name__]}
    finally:
        output._find_remote = before


@functools.cache
def _open_counts(folder: str, kind: str) -> "np.memmap[Any, np.dtype[np.int64]]":
    Path(folder).mkdir(parents=True, exist_ok=True)
    return np.memmap(Path(folder) / f"{kind}-{os.getpid()}", np.int64, "w+", shape=(len(FIELDS),))


class TaskClock(WorkerPlugin):
    """Counts how long a worker of one thread had a task to execute, as its own state machine has it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._started: dict[object, float] = {}

    def transition(self, key: object, start: str, finish: str, **_: object) -> None:
        """Called on the worker when a task changes its state."""
        if finish == "executing":
            self._started[key] = time.perf_counter()
        elif start == "executing":
            counts = _open_counts(self._folder, "task")
            counts[0] += 1
            counts[2] += int((time.perf_counter() - self._started.pop(key)) * 1e6)


async def dask_setup(worker: Worker) -> None:
    """Have a worker count its tasks, as Dask calls a module that it loads beforehand."""
    if folder := os.environ.get(CLOCKS):
        await worker.plugin_add(plugin=TaskClock(folder), name="task-clock")


def read_counts(folder: Path, kind: str) -> list[dict[str, int]]:
    """Return what each process has counted of ``read`` or ``drop``."""
    files = sorted(folder.glob(f"{kind}-*"))
    return [dict(zip(FIELDS, map(int, np.fromfile(file, np.int64)), strict=True)) for file in files]


class FarFileSystem(AbstractFileSystem):
    """Files of this machine as if they were far away."""

    protocol = "far"
    root_marker = "/"

    def __init__(self, latency_ms: float = 0.0, rate: float = float("inf"), counts: str = "", **more: Any) -> None:
        """latency_ms: until an answer begins. rate: bytes a second of this process. counts: folder of the counts."""
        super().__init__(**more)
        self._latency_s, self._rate, self._counts = latency_ms / 1e3, rate, counts

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return what is known of a file, after the latency."""
        time.sleep(self._latency_s)
        return _describe(self._strip_protocol(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a folder, after the latency."""
        time.sleep(self._latency_s)
        folder = self._strip_protocol(path)
        found = [_describe(str(beneath)) for beneath in sorted(Path(folder).iterdir())]
        return found if detail else [each["name"] for each in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return a range, after the latency, at the rate."""
        started = time.perf_counter()
        counts = _open_counts(self._counts, "read") if self._counts else np.zeros(len(FIELDS), np.int64)
        with _lock:
            counts[3] += 1
            counts[4] = max(counts[4], counts[3])
        with open(self._strip_protocol(path), "rb", buffering=0) as file:
            first = start or 0
            data = os.pread(file.fileno(), (os.fstat(file.fileno()).st_size if end is None else end) - first, first)
        self._wait(started, len(data))
        with _lock:
            counts[:4] += (1, len(data), int((time.perf_counter() - started) * 1e6), -1)
        return data

    def _wait(self, started: float, size_bytes: int) -> None:
        """Return when the answer is here: one after the other they take the process's bandwidth."""
        global _free_s
        with _lock:
            _free_s = max(_free_s, started + self._latency_s) + size_bytes / self._rate
            here_s = _free_s
        time.sleep(max(0.0, here_s - time.perf_counter()))


def _describe(path: str) -> dict[str, Any]:
    found = Path(path).stat()
    kind = "directory" if stat.S_ISDIR(found.st_mode) else "file"
    return {"name": path, "size": found.st_size, "type": kind, "mtime": found.st_mtime_ns}


class DropOutput(FolderOutput):
    """A folder whose shards have their header, their size and nothing in them; ``drop-all://``: no part is merged."""

    def __init__(self, url: str) -> None:
        scheme, path = url.split("://", 1)
        super().__init__(Path(path), url)
        self._skip = scheme == "drop-all"

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Write the record and the headers; the disk need not have room for more."""
        self.write_record(plan)
        for shard in plan.shards:
            with self.unfinished(shard.name, plan.digest).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size_bytes)
        return {}

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return one target for all parts."""
        return [DropTarget(str(self.folder / "counts"), self._skip)] * len(plan.parts)


@dataclass(frozen=True, slots=True)
class DropTarget:
    """Where the bytes of parts are counted."""

    counts: str  # folder of the counts
    skip: bool  # whether parts are receipted at once, so that nothing but the scheduling is left
    beside_bytes = 0

    def copy_part(self, part: Part, shard: str, workplace: Workplace) -> Receipt | None:
        """Return a receipt at once where that is all that is wanted."""
        if not self.skip:
            return None
        self._count(part.size_bytes)
        return Receipt(part.number, shard, part.start_bytes, part.stop_bytes, "", 0, 0.0)

    @contextmanager
    def open_part(self, part: Part, room: Arena) -> Iterator["DropWriter"]:
        """Take the part's bytes, which must come in order and without holes."""
        writer = DropWriter(part)
        yield writer
        self._count(writer.taken_bytes)

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """Nothing is there to be looked at."""
        return False

    def _count(self, size_bytes: int) -> None:
        counts = _open_counts(self.counts, "drop")
        with _lock:
            counts[:2] += (1, size_bytes)


class DropWriter:
    """Counts the bytes of one part."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.taken_bytes = 0

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Count what must follow the bytes before."""
        if offset_bytes != self._part.start_bytes + self.taken_bytes:
            raise ValueError(f"part {self._part.number}: bytes at {offset_bytes} do not follow those before")
        self.taken_bytes += data.nbytes

    def finish(self) -> Sequence[Upload]:
        """Raise unless the part is whole."""
        if self.taken_bytes != self._part.size_bytes:
            raise ValueError(f"part {self._part.number}: {self.taken_bytes} of {self._part.size_bytes} bytes came")
        return ()


ALLOWED["far"] = ("latency_ms", "counts", "rate")
fsspec.register_implementation("far", FarFileSystem, clobber=True)

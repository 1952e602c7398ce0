"""What a worker process lends to its tasks: memory within a promise, first come first served, as reused arenas.

The gate holds on any cluster, whatever flags its workers were started with: a task asks for its projected bytes
before it reads, and waits while the tasks before it hold too much. A task that asks for little does not overtake one
that asks for much, or the large one would wait for ever.
"""

import mmap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.storage.cache import RangeCache
from mergemill.engine.storage.store import ENVIRONMENT, Storage
from mergemill.engine.tensors.device import Streams
from mergemill.engine.tensors.workspace import Arena, Lasting

MALLOC_BYTES = 40 << 20  # a thread; measured up to 26 MiB: freed scratch that glibc keeps, and its fragments
_STEP = 1 << 20  # bytes; arenas are whole multiples, so that they fit the next task as well


@dataclass(frozen=True, slots=True)
class Counts:
    """What the tasks of a workplace have done."""

    read_bytes: int = 0  # from the sources, second reads included
    written_bytes: int = 0  # of finished parts
    parts: int = 0  # that are finished
    waited_s: float = 0.0  # for memory, in sum

    def plus(self, other: "Counts") -> "Counts":
        """Return the sum of both."""
        return Counts(
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.parts + other.parts,
            self.waited_s + other.waited_s,
        )


class Workplace:
    """Memory for the tasks of one process: at most `memory_bytes`, shared by `threads` tasks at a time.

    With it goes how they reach `storage`, the `cache` of this host, where there is one, that their reads go through,
    and the `device` that they merge on, where it is not the CPU. stopped: what tasks end with when the worker does.
    """

    def __init__(
        self,
        memory_bytes: int,
        threads: int,
        cache: RangeCache | None = None,
        stopped: type[Exception] = RunError,
        *,
        storage: Storage = ENVIRONMENT,
        device: "DevicePlace | None" = None,
    ) -> None:
        self.storage = storage
        self.device = device
        self.memory_bytes = memory_bytes
        self.threads = threads
        self.cache = cache
        self.lasting = Lasting()
        self._stopped = stopped
        self.stopping = False  # set when the worker goes: tasks then end at their next slab
        self.peak_bytes = 0  # the most that was ever lent at once
        self.counts = Counts()
        self._lent_bytes = 0
        self._lent = 0  # arenas
        self._free: list[Arena] = []
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def share_bytes(self) -> int:
        """What each of the tasks may take without keeping another from running, nor malloc from what it holds."""
        share_bytes = self.memory_bytes // self.threads
        return max(share_bytes - MALLOC_BYTES, share_bytes // 2)

    @property
    def lent_bytes(self) -> int:
        """What tasks hold now."""
        return self._lent_bytes

    @property
    def waiting(self) -> int:
        """How many tasks wait for memory now."""
        return len(self._queue)

    def count(self, done: Counts) -> None:
        """Add what a task has done."""
        with self._changed:
            self.counts = self.counts.plus(done)

    @contextmanager
    def lend(self, size_bytes: int, beside_bytes: int = 0) -> Iterator[Arena]:
        """Lend a flat uint8 array of at least `size_bytes`, once it is this task's turn and the memory is there.

        beside_bytes: what the task, or a library that it uses, allocates meanwhile; it counts as lent too.
        """
        # As a whole number of steps, but never beyond the promise.
        size_bytes = max(size_bytes, min(-(-size_bytes // _STEP) * _STEP, self.memory_bytes - beside_bytes))
        if size_bytes + beside_bytes > self.memory_bytes:
            raise RunError(
                f"a task needs {size_bytes + beside_bytes} bytes and this worker was promised {self.memory_bytes}"
            )
        arena = self._enter(size_bytes, beside_bytes)
        try:
            yield arena
        finally:
            self._leave(arena, beside_bytes)

    def drop_free(self) -> None:
        """Give up the arenas that no task holds."""
        with self._changed:
            self._free.clear()

    def check_going(self) -> None:
        """Raise `stopped`, which tasks end with, when the worker is being stopped."""
        if self.stopping:
            raise self._stopped("the worker is being stopped")

    def _enter(self, size_bytes: int, beside_bytes: int) -> Arena:
        ticket = object()
        began_s = time.monotonic()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket and self._fits(size_bytes + beside_bytes))
            self._queue.popleft()
            self.counts = self.counts.plus(Counts(waited_s=time.monotonic() - began_s))
            self._changed.notify_all()  # also where no arena can be had: the next in line has its turn
            arena = self._take_arena(size_bytes, self.memory_bytes - beside_bytes)
            self._lent_bytes += len(arena) + beside_bytes
            self._lent += 1
            self.peak_bytes = max(self.peak_bytes, self._lent_bytes)
        return arena

    def _leave(self, arena: Arena, beside_bytes: int) -> None:
        with self._changed:
            self._lent_bytes -= len(arena) + beside_bytes
            self._lent -= 1
            self._free.append(arena)
            self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._lent_bytes + size_bytes <= self.memory_bytes

    def _take_arena(self, size_bytes: int, most_bytes: int) -> Arena:
        """Reuse the smallest free arena that fits; drop free ones until all that are there fit into `most_bytes`."""
        self._free.sort(key=len)
        taken = None
        for i, arena in enumerate(self._free):
            if len(arena) >= size_bytes and self._lent_bytes + len(arena) <= most_bytes:
                taken = self._free.pop(i)
                break
        # No more arenas than threads: small ones beside the large ones would be memory that nobody uses.
        while self._free and self._lent + len(self._free) >= self.threads:
            self._free.pop(0)
        size_bytes = size_bytes if taken is None else len(taken)
        while self._free and self._lent_bytes + sum(map(len, self._free)) + size_bytes > most_bytes:
            self._free.pop()
        return self._map(size_bytes) if taken is None else taken

    def _map(self, size_bytes: int) -> Arena:
        arena = _map_arena(size_bytes)
        if self.device is not None:
            self.device.pin(arena)
        return arena


def _map_arena(size_bytes: int) -> Arena:
    """Return fresh memory, in huge pages where there are, which goes back to the kernel when nobody holds it.

    What is allocated instead stays with malloc for later when it is small, beside the promise.
    """
    region = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, np.uint8)


class DevicePlace(Workplace):
    """The memory of a device, lent as that of the host is: arenas, and what is allocated beside them."""

    kind = ""  # of the device, as torch calls it

    def streams(self) -> Streams:
        """Return how one task feeds the device."""
        raise NotImplementedError

    def limited(self) -> AbstractContextManager[None]:
        """In the block this process is refused what is far beyond the promise, where the device can do that."""
        return nullcontext()

    def pin(self, arena: Arena) -> None:
        """Keep an arena of the host where the device can copy from it and to it by itself."""

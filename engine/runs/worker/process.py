"""What a process that merges is set up with: one torch thread a task, and an allocator that keeps its pages."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mergemill.engine.storage.ranges import close_all
from mergemill.engine.tensors.lazy import on_first_use

_MALLOPT_TRIM, _MALLOPT_MMAP = -1, -3  # of malloc.h


@contextmanager
def set_up_process() -> Iterator[None]:
    """Set this process up for a merge; afterwards torch has its threads again, and sources are closed."""
    keep_freed_pages()
    _TORCH.enter()
    try:
        yield
    finally:
        _TORCH.leave()
        close_all()


class _TorchThreads:
    """How many threads torch has: one while merges run in this process, afterwards as many as before.

    torch may be loaded already, be loaded by the first task that needs it, or never be.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._merges = 0
        self._before: int | None = None  # None: not limited

    def enter(self) -> None:
        with self._lock:
            self._merges += 1
            if "torch" in sys.modules:
                self._limit()

    def limit(self) -> None:
        with self._lock:
            if self._merges:
                self._limit()

    def leave(self) -> None:
        with self._lock:
            self._merges -= 1
            if not self._merges and self._before is not None:
                import torch

                torch.set_num_threads(self._before)
                self._before = None

    def _limit(self) -> None:
        # Not by way of `lazy`, which may hold its own lock and wait for the one held here.
        import torch

        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(1)


_TORCH = _TorchThreads()
on_first_use(_TORCH.limit)


def keep_freed_pages() -> None:
    """Let glibc keep freed blocks of up to 8 MiB instead of returning their pages.

    Dask's nanny sets MALLOC_TRIM_THRESHOLD_, after which every temporary of a kernel would be mapped and
    faulted in anew. Elsewhere than on glibc nothing is done.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and os.uname().sysname == "Linux":
        library.mallopt(_MALLOPT_MMAP, 8 << 20)
        library.mallopt(_MALLOPT_TRIM, 32 << 20)

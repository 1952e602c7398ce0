"""What a process that merges is set up with: torch as merges want it; on workers, an allocator that keeps its pages."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mergemill.engine.runs.worker.modes import torch_for_merges
from mergemill.engine.storage.ranges import close_all

_MALLOPT_TRIM, _MALLOPT_MMAP = -1, -3  # of malloc.h


@contextmanager
def set_up_process() -> Iterator[None]:
    """Set this process up for a merge; afterwards torch is as before, and sources are closed."""
    with torch_for_merges():
        try:
            yield
        finally:
            close_all()


def keep_freed_pages() -> None:
    """Let glibc keep freed blocks of up to 8 MiB instead of returning their pages.

    Dask's nanny sets MALLOC_TRIM_THRESHOLD_, after which every temporary of a kernel would be mapped and
    faulted in anew. Elsewhere than on glibc nothing is done. It cannot be undone, so only workers do it: in a caller's
    process glibc finds such bounds by itself.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and os.uname().sysname == "Linux":
        library.mallopt(_MALLOPT_MMAP, 8 << 20)
        library.mallopt(_MALLOPT_TRIM, 32 << 20)

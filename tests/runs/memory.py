"""The memory of a process, as the kernel counts it. Workers can import this module."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any


def reset_peak() -> tuple[int, int]:
    """Forget the most memory that this process ever had resident; returns its number, and the bytes it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return os.getpid(), peak_bytes(os.getpid())


def peak_bytes(process: int) -> int:
    """Return the most memory that a process had resident, since it was last forgotten."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) << 10


def look_at_process() -> dict[str, Any]:
    """Return what this process is set up with: torch's threads, and whether malloc maps 4 MiB, and 9 MiB."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def is_mapped(size_bytes: int) -> bool:
        block = libc.malloc(size_bytes)
        flags = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
        libc.free(block)
        return bool(flags & 2)  # IS_MMAPPED of glibc's malloc.c

    torch = sys.modules.get("torch")
    return {
        "pid": os.getpid(),
        "torch": torch.get_num_threads() if torch else None,
        "mapped": (is_mapped(4 << 20), is_mapped(9 << 20)),
    }

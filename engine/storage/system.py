"""What one system has and another has not, behind functions that do the same on each: Linux and macOS.

Nobody else calls what macOS lacks; types are checked for both systems (`.ci/run`), and merges run with all of it taken
away (`tests/storage/test_system.py`). Flags of `os.open` that are used are POSIX's, and what Python opens no program
that it starts inherits. Windows has no locks of files, no files below a descriptor and no links that must not be
followed, and is refused by the engine's face. psutil is imported where it is needed, which is not on Linux.
"""

import fcntl
import os
import sys
import uuid
from pathlib import Path

COPY_BYTES = 1 << 20  # read at once where a read must be copied
WRITE_BYTES = 1 << 30  # written at once: macOS takes no 2 GiB
PROC = Path("/proc")  # of Linux; elsewhere nothing is there


def count_cores() -> int:
    """Return how many cores this process may use; where none are set aside for it, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_at(descriptor: int, buffer: memoryview, offset_bytes: int) -> int:
    """Fill the beginning of `buffer` with what a file has at an offset; returns how many bytes, 0 at its end."""
    if hasattr(os, "preadv"):  # of macOS since 11
        return os.preadv(descriptor, [buffer], offset_bytes)
    data = os.pread(descriptor, min(len(buffer), COPY_BYTES), offset_bytes)
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    """Write all of `data` at an offset of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + WRITE_BYTES], offset_bytes + done)


def fetch_soon(descriptor: int, offset_bytes: int, size_bytes: int) -> None:
    """Ask the system to fetch a range that will be read; one that cannot be asked reads ahead as it likes."""
    _advise(descriptor, offset_bytes, size_bytes, "POSIX_FADV_WILLNEED")


def write_soon(descriptor: int, offset_bytes: int, size_bytes: int) -> None:
    """Ask the system to begin writing a range to the disk; where it cannot be asked, the sync has more left to do."""
    _advise(descriptor, offset_bytes, size_bytes, "POSIX_FADV_DONTNEED")


def _advise(descriptor: int, offset_bytes: int, size_bytes: int, wish: str) -> None:
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(descriptor, offset_bytes, size_bytes, getattr(os, wish))


def sync(descriptor: int) -> None:
    """Return once a file, or the names in a folder, are on the disk."""
    if not _sync_fully(descriptor):
        os.fsync(descriptor)


def sync_content(descriptor: int) -> None:
    """Return once what a file holds is on the disk; its times may not be."""
    if _sync_fully(descriptor):
        return
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def _sync_fully(descriptor: int) -> bool:
    """Sync as macOS does with F_FULLFSYNC: its fsync leaves the data in the drive's own memory. False where that fails.

    Some file systems do not know it (SMB, FUSE), as SQLite found; there the caller's sync is what there is.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        return False
    try:
        fcntl.fcntl(descriptor, full)
    except OSError:
        return False
    return True


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock a file for this descriptor, until it is closed; without `wait`, OSError while another has it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def name_start() -> str | None:
    """Return what processes share that see each other by number: one start of one machine, and a namespace of numbers.

    None where that is not known. A host name would not do: containers may share it without seeing each other.
    """
    if sys.platform == "darwin":
        import psutil

        return f"{uuid.getnode():x} {psutil.boot_time():.0f}"  # without containers; other ones once its clock is set
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def find_start(process: int) -> str | None:
    """Return when a process began, since numbers are used again; None where it has ended.

    On Linux in ticks since the machine's start, and not psutil's time of day (2026-11-29): that one moves when the
    clock is set, and whoever compared it would take a process that runs for one that has ended.
    """
    if sys.platform == "linux":
        try:
            state, *fields = (PROC / f"{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else f"{found.create_time():.6f}"
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # no number of a process
        return None


def name_file_system(path: Path, device: int) -> str:
    """Return the kind of file system that `path` lies on, which `device` is the number of; empty if that is unknown."""
    if sys.platform == "linux":
        return _find_mounted(f"{os.major(device)}:{os.minor(device)}")
    import psutil

    holding = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(holding, key=lambda part: len(part.mountpoint)).fstype if holding else ""


def _find_mounted(device: str) -> str:
    try:
        mounts = [line.split() for line in (PROC / "self/mountinfo").read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((fields[fields.index("-") + 1] for fields in mounts if fields[2] == device), "")

"""Running a program to its end and taking what it cost: time, CPU seconds, memory, bytes. Linux only."""

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.02  # between two looks at the memory
SAMPLES = 10  # looks between two searches for new processes
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What one run of a program took, all its processes together."""

    wall_s: float
    cpu_s: float  # user and system
    peak_bytes: int  # resident at once, file pages that are mapped included, shared pages once a process
    peak_private_bytes: int  # the same without pages of files and of shared memory
    read_bytes: int  # by system calls; what is mapped does not count
    disk_read_bytes: int  # what the disk was asked for, mapped or not
    written_bytes: int  # by system calls
    output: str  # what it printed


class ProgramError(Exception):
    """A program ended with an error; its last lines are the message."""


def measure(command: Sequence[str], environ: Mapping[str, str]) -> Usage:
    """Run a command; raises `ProgramError` where it fails."""
    read_before, disk_before, written_before = _read_io()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, text=True)
    watch = _Watch(process.pid)
    watch.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, spent = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.stop()
    if process.returncode:
        raise ProgramError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    read, disk, written = _read_io()
    return Usage(
        wall_s=wall_s,
        cpu_s=spent.ru_utime + spent.ru_stime,
        peak_bytes=watch.peak_bytes,
        peak_private_bytes=watch.peak_private_bytes,
        read_bytes=read - read_before,
        disk_read_bytes=disk - disk_before,
        written_bytes=written - written_before,
        output=output,
    )


def _read_io() -> tuple[int, int, int]:
    """Return bytes read, read from disk, and written, by this process and all that it has waited for."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["read_bytes"]), int(lines["wchar"])


class _Watch(threading.Thread):
    """Samples the memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.peak_bytes = self.peak_private_bytes = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        looks = 0
        family = [self._pid]
        while not self._stopped.wait(SAMPLE_S):
            looks += 1
            if looks % SAMPLES == 0:
                family = list_family(self._pid)
            sizes = [read_memory(pid) for pid in family]
            self.peak_bytes = max(self.peak_bytes, sum(resident for resident, _ in sizes))
            self.peak_private_bytes = max(self.peak_private_bytes, sum(resident - shared for resident, shared in sizes))

    def stop(self) -> None:
        """End the sampling and wait for its end."""
        self._stopped.set()
        self.join()


def list_family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def read_memory(pid: int) -> tuple[int, int]:
    """Return resident and shared bytes of a process; zeros for one that has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0, 0
    return int(resident) * PAGE_BYTES, int(shared) * PAGE_BYTES


def sync_files(paths: Iterable[Path]) -> float:
    """Wait until the disk has these files; returns the seconds that it took."""
    started = time.perf_counter()
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
    return time.perf_counter() - started


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Let go of what the page cache holds of these files; what is not written yet is written before."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

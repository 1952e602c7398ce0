"""A system that lacks what macOS does, and has what it has: simulated on this one."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mergemill.engine.storage import stamps, system

LACKING = ("copy_file_range", "fdatasync", "posix_fadvise", "posix_fallocate", "preadv", "pwritev", "sched_getaffinity")
FULL_SYNC = 51  # F_FULLFSYNC of macOS


@contextmanager
def as_on_macos() -> Iterator[list[int]]:
    """Take away what macOS 10 lacks, while the block lasts; gives the commands that `fcntl` was called with."""
    commands: list[int] = []

    def control(descriptor: int, command: int) -> int:
        os.fstat(descriptor)  # it is open
        commands.append(command)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for name in LACKING:
            patch.delattr(os, name)
        patch.setattr(system, "PROC", Path("/none"))
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(fcntl, "F_FULLFSYNC", FULL_SYNC, raising=False)
        patch.setattr(fcntl, "fcntl", control)
        stamps._makes_up.cache_clear()
        yield commands
    stamps._makes_up.cache_clear()

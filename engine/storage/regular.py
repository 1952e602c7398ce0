"""Opening files of this machine that anybody may have put there: only files, and no more of them than may be read.

A pipe or a device in the place of a file would be waited for without end, or answer without end. Nothing here waits:
what something is, is asked before it is opened, and again of what was opened.
"""

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(found: os.stat_result) -> None:
    """Raise OSError for what is no file, such as a pipe."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")


def open_regular(path: str | Path, flags: int = 0) -> int:
    """Return a descriptor of the file at `path`, for reading; OSError where it cannot be opened, or is no file."""
    check_regular(Path(path).stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | flags)
    try:
        check_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """Return what the file at `path` holds; OSError where that cannot be read, or is more than `most_bytes`."""
    with open(open_regular(path), "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than the {most_bytes} bytes that such a file may have")
    return data

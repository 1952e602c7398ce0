"""Names of an output's files that a file system may not take: found by the plan, not at the commit.

Decided 2026-11-29: 255 bytes are the most that a name has on any usual disk, and what a merge calls a file until it is
whole is longer than its name. Names that differ in case alone are two on Linux and one elsewhere: that is told.
"""

import unicodedata
from collections.abc import Iterable, Iterator

from mergemill.engine.errors import PlanError

MOST_NAME_BYTES = 255
_UNFINISHED_BYTES = len(".tmp-0123456789ab")  # of a shard; of a small file, with the dot before it, it is less


def check_lengths(names: Iterable[str]) -> None:
    """Raise `PlanError` for a name that cannot be written.

    >>> check_lengths(["a" * 238, "folder/" + "a" * 238])
    """
    for name in names:
        *folders, last = name.split("/")
        size = max(len(last.encode()) + _UNFINISHED_BYTES, *(len(folder.encode()) for folder in ("", *folders)))
        if size > MOST_NAME_BYTES:
            raise PlanError(
                f"{name[:64]}…: a file of the output would have this name, which is {size - MOST_NAME_BYTES} bytes too "
                f"long for a disk, with what it has until it is whole; {MOST_NAME_BYTES} are the most: rename it"
            )


def warn_of_twins(names: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each file whose name is another's on disks that do not tell capitals from small letters."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            yield f"{name} and {other} differ in case alone: they are one file on most disks of macOS and Windows"

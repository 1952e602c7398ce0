"""What a file system says of a file that changes when its content does: the stamps of local pins.

Times alone can be set back, as `cp -p`, `rsync -t` and the makers of images do. A stamp has the time of the content,
that of the last change of anything, which nobody can set, and the number of the file. Decisions (2026-11-29):

* No number of the device: it differs between the hosts that mount one folder, and after the next start of one, so that
  no merge could be shared or resumed; a file elsewhere with the same number and both times does not come by accident.
* Some file systems make up numbers and times, as FUSE does and read-only images do; they may say others to another
  host, or an hour later. There a checksum of a sample of the content stands for them.
* What changes the last time and no byte (other rights, another name or hard link) counts as a change: from outside it
  looks like a file that was written and given its old time. The merge begins anew, and the error says why.
"""

import functools
import os
import re
from pathlib import Path

from mergemill.engine.storage import system
from mergemill.engine.storage.sample import is_sampled, make_sample

_MADE_UP = re.compile(  # kinds of file systems, of Linux and of macOS
    r"fuse.*|9p|cifs|smb3|vfat|msdos|exfat|squashfs|erofs|iso9660|udf|cramfs|romfs|(mac|osx)fuse.*|smbfs|webdav|cd9660"
)


def make_stamp(path: str, found: os.stat_result, like: str | None = None) -> str:
    """Return the stamp of the file at `path`; with the fields of `like`, since hosts may mount a folder differently."""
    if _makes_up(Path(path).parent, found.st_dev) if like is None else is_sampled(like):
        return f"{_say(found, sampled=True)} {_sample(path, found.st_size)}"
    return _say(found, sampled=False)


def compare_open(found: os.stat_result, stamp: str) -> str:
    """Return how an open file differs from a stamp, as far as is known without a look at its content; empty if not."""
    then, now = stamp.partition(" sample:")[0], _say(found, sampled=is_sampled(stamp))
    return "" if now == then else f"{now}: {describe_change(then, now)}"


def parse_stamp(stamp: str) -> dict[str, str]:
    """Return the fields of a local stamp.

    >>> parse_stamp("mtime_ns:1 inode:2")
    {'mtime_ns': '1', 'inode': '2'}
    """
    return {name: value for name, _, value in (field.partition(":") for field in stamp.split(" ")) if value}


def describe_change(then: str, now: str) -> str:
    """Say in which respects two stamps of files of one size differ, and what may be behind it.

    >>> describe_change("mtime_ns:1 ctime_ns:2 inode:3", "mtime_ns:4 ctime_ns:5 inode:3")
    'its mtime, ctime differ'
    >>> describe_change("mtime_ns:1", "mtime_ns:1 ctime_ns:2 inode:3")
    'an earlier version of mergemill, or a host that mounts it differently, noted less of it'
    """
    before, after = parse_stamp(then), parse_stamp(now)
    if before.keys() != after.keys():
        return "an earlier version of mergemill, or a host that mounts it differently, noted less of it"
    different = [name.removesuffix("_ns") for name in before if before[name] != after[name]]
    said = f"its {', '.join(different)} differ"
    if "mtime" in different or "ctime" not in different:
        return said
    return (
        f"{said} and its mtime does not, as where another file is given the time of this one; other rights, another "
        "name or a hard link do that too, and cannot be told from it"
    )


def _say(found: os.stat_result, *, sampled: bool) -> str:
    return f"mtime_ns:{found.st_mtime_ns}" + ("" if sampled else f" ctime_ns:{found.st_ctime_ns} inode:{found.st_ino}")


def _sample(path: str, size_bytes: int) -> str:
    with open(path, "rb") as file:
        return make_sample(size_bytes, lambda start, stop: os.pread(file.fileno(), stop - start, start))


@functools.cache
def _makes_up(folder: Path, device: int) -> bool:
    """Whether the file system of a folder makes up numbers or times; one that is not listed is taken at its word."""
    return _MADE_UP.fullmatch(system.name_file_system(folder, device)) is not None

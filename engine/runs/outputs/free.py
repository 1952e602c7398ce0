"""Whether a folder can become an output: nothing of another's is there, and every path of the merge fits the system.

Looked at before anything is written (2026-11-29). A path has a length of its own beside that of each name in it, and
how long each may be is asked of the disk: encrypting ones take less than `plan.names` knows of.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import OutputError
from mergemill.engine.storage.positioned import check_writable

_MOST_SHOWN = 64  # characters of what is too long


def check_free(folder: Path) -> None:
    """Raise `OutputError` unless a folder is new, or empty but for mergemill's own state."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the output must be a folder, new or empty")
    found = sorted(path.name for path in folder.iterdir() if path.name != STATE_NAME) if folder.exists() else []
    if found:
        raise OutputError(f"{folder}: holds {found[0]!r}{_more(found)}; the output must be a folder, new or empty")


def check_place(folder: Path, names: Iterable[str]) -> None:
    """Raise `OutputError` where files of these names, in or below a folder, could never be made, whoever tried.

    For a path, or a name in it, that is too long, and a file, a link to nothing, or a folder that may not be written on
    the way to the folder.
    """
    above = find_lowest(folder.absolute())
    if not above.exists():
        raise OutputError(
            f"{above}: is a link to {str(above.readlink())!r}, where nothing is; make that folder, or remove the link"
        )
    if above != folder.absolute() and not above.is_dir():
        raise OutputError(f"{folder}: would lie below {above}, which is a file; choose another folder")
    if above.is_dir():
        check_writable(above)
    most_name, most_path = os.pathconf(above, "PC_NAME_MAX"), os.pathconf(above, "PC_PATH_MAX") - 1  # less its end
    paths = [folder.absolute() / name for name in names]
    for path in paths:
        for part in path.relative_to(above).parts if path.is_relative_to(above) else ():
            _check_length(part, most_name, "a name", folder)
    longest = max(paths, key=_count_bytes, default=folder.absolute())
    _check_length(str(longest), most_path, "a path", folder)


def find_lowest(folder: Path) -> Path:
    """Return what is there of a path: the folder itself, or else the lowest of those above it, also a broken link."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _check_length(text: str, most_bytes: int, what: str, folder: Path) -> None:
    over = _count_bytes(text) - most_bytes
    if over > 0:
        raise OutputError(
            f"{str(folder)[:_MOST_SHOWN]}…: {what} of the output would be {over} bytes too long for this disk, with "
            f"what files are called until they are whole; {most_bytes} are the most: choose another folder"
        )


def _count_bytes(path: str | Path) -> int:
    return len(os.fsencode(path))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

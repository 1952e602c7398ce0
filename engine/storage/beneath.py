"""Files below a folder that are reached without following links: no other's file is read, written or removed by them.

The folder itself is what the user named, and may be a link. Each name below it is opened relative to the folder before
(``openat`` with ``O_NOFOLLOW``), where a link is an error; so is anything but a regular file, and a file with a second
name (a hard link) where it would be written. Linux and macOS have all that this needs.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage import system
from mergemill.engine.storage.bounds import find_state_bound
from mergemill.engine.storage.objects import check_state

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK  # so that a FIFO in a file's place is refused at once
_WRITES = os.O_WRONLY | os.O_RDWR
_LINKED = (errno.ELOOP, errno.EMLINK)  # what a link is to O_NOFOLLOW: of POSIX, and of FreeBSD
_DENIED = (errno.EACCES, errno.EPERM)
UNFINISHED = ".tmp-"  # in the name of a file that is being written
PIECE_BYTES = 4 << 20  # that are read of a file at a time


class Beneath:
    """The files below `root`, by names with ``/`` between folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, name: str) -> Path:
        """Return the path of a file, for messages and for others to open."""
        return self.root / name

    def find(self, name: str) -> os.stat_result | None:
        """Return what lies at a name, a link as the link that it is; None where nothing does."""
        try:
            with self._explained(name, "looking at"), self._folder(name) as folder:
                return os.stat(_last(name), dir_fd=folder, follow_symlinks=False)
        except _Absent:
            return None

    def find_file(self, name: str) -> os.stat_result | None:
        """Return what is known of a regular file; None where there is none, or something else."""
        found = self.find(name)
        return found if found is not None and stat.S_ISREG(found.st_mode) else None

    def find_folder(self, name: str) -> bool:
        """Whether a folder is there; `OutputError` for a link, wherever it leads."""
        found = self.find(name)
        if found is not None and stat.S_ISLNK(found.st_mode):
            raise _linked(self.place(name))
        return found is not None and stat.S_ISDIR(found.st_mode)

    def open(self, name: str, flags: int) -> int:
        """Return the descriptor of a regular file; `StorageError` where it is not there and `flags` do not make it."""
        try:
            with self._explained(name, "opening"), self._folder(name) as folder:
                return _check(os.open(_last(name), flags | _FILE, 0o666, dir_fd=folder), self.place(name), flags)
        except _Absent as absent:
            raise StorageError(f"{self.place(name)}: opening this file failed: {absent.strerror}") from absent

    def read(self, name: str) -> bytes | None:
        """Return a file; None where there is none, `StorageError` where it is larger than such a file may be."""
        if self.find(name) is None:
            return None
        with self._explained(name, "reading"), open(self.open(name, os.O_RDONLY), "rb") as file:
            data = file.read(find_state_bound(name) + 1)
        return check_state(data, str(self.place(name)))

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield a file that is there, a few megabytes at a time."""
        with self._explained(name, "reading"), open(self.open(name, os.O_RDONLY), "rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def list_names(self, name: str) -> list[str]:
        """Return what a folder holds, sorted; nothing where there is no folder."""
        try:
            with self._explained(name, "listing"), self._folder(f"{name}/.") as folder:
                return sorted(os.listdir(folder))  # noqa: PTH208
        except _Absent:
            return []

    def write(self, name: str, data: bytes | Iterable[bytes], *, beside: str, synced: bool = True) -> None:
        """Write a file so that it is there whole or not at all: in the folder `beside`, synced, renamed.

        One that is there is replaced. The folders of the name are made.
        """
        place = name_beside(name, beside)
        for parent in list(PurePosixPath(name).parents)[-2::-1]:
            self.make_folder(parent.as_posix())
        try:
            with self._explained(name, "writing"):
                with open(self.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                    for piece in [data] if isinstance(data, bytes) else data:
                        file.write(piece)
                    file.flush()
                    if synced:
                        system.sync(file.fileno())
                self.rename(place, name)
        except BaseException:
            with suppress(StorageError):
                self.remove(place)
            raise
        if synced:
            self.sync(PurePosixPath(name).parent.as_posix())

    def rename(self, name: str, to: str) -> None:
        """Give a file another name; a link of that name is replaced, not followed."""
        with self._explained(to, "renaming to"), self._folder(name) as source, self._folder(to) as target:
            os.rename(_last(name), _last(to), src_dir_fd=source, dst_dir_fd=target)

    def remove(self, name: str) -> None:
        """Remove a file, or a link and not what it leads to; none is no error."""
        with suppress(_Absent), self._explained(name, "removing"), self._folder(name) as folder:
            _check_removable(_last(name), folder, self.place(name))
            os.unlink(_last(name), dir_fd=folder)

    def make_folder(self, name: str) -> None:
        """Create a folder unless it is there; those above it are."""
        with self._explained(name, "creating"), self._folder(name) as folder:
            with suppress(FileExistsError):
                os.mkdir(_last(name), dir_fd=folder)
            os.close(_open_folder(_last(name), folder))

    def remove_folder(self, name: str) -> None:
        """Remove a folder if nothing is in it."""
        if not self.list_names(name):
            with suppress(_Absent), self._explained(name, "removing"), self._folder(name) as folder:
                os.rmdir(_last(name), dir_fd=folder)

    def sync(self, name: str) -> None:
        """Return once the names in a folder are on the disk."""
        with self._explained(name, "syncing"), self._folder(f"{name}/.") as folder:
            system.sync(folder)

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """Open the folder that a name lies in."""
        descriptor = os.open(self.root, _FOLDER)
        try:
            for part in _split(name)[:-1]:
                inner = _open_folder(part, descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _explained(self, name: str, doing: str) -> Iterator[None]:
        try:
            yield
        except _Absent:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _Absent(f"{self.place(name)}: {doing} this file failed: {error.strerror}", error.strerror) from error
        except OSError as error:
            if error.errno in _LINKED:
                raise _linked(self.place(name)) from error
            owner = _say_owner(self.root, name) if error.errno in _DENIED else ""
            raise StorageError(f"{self.place(name)}: {doing} this file failed: {error.strerror}{owner}") from error


def name_beside(name: str, beside: str) -> str:
    """Return a new name in the folder `beside` for a file until it is whole and gets its own."""
    return f"{beside}/.{_last(name)}{UNFINISHED}{secrets.token_hex(4)}"


class _Absent(StorageError):
    """There is nothing of that name."""

    def __init__(self, message: str, strerror: str | None) -> None:
        super().__init__(message)
        self.strerror = strerror


def _say_owner(root: Path, name: str) -> str:
    """Return what helps where something is denied: whose the first folder or file on the way is that is another's."""
    for place in (root, *(root / parent for parent in list(PurePosixPath(name).parents)[-2::-1]), root / name):
        try:
            found = os.lstat(place)
        except OSError:
            return ""
        if found.st_uid != os.geteuid():
            return f"; {place} belongs to user {found.st_uid}, who can go on with it: choose another folder for yours"
    return ""


def _split(name: str) -> tuple[str, ...]:
    """Return the parts of a name, its last a dot where the folder itself is meant."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:  # of a plan they are refused before: see `check_names`
        raise OutputError(f"{name!r}: is a name outside of the folder that it is to be in")
    return (*parts, ".") if name.endswith("/.") else parts


def _last(name: str) -> str:
    return PurePosixPath(name).name


def _open_folder(name: str, parent: int) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    except NotADirectoryError as error:  # what a link is to Linux, here
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
        raise


def _check(descriptor: int, path: Path, flags: int) -> int:
    """Return the descriptor if it is that of a file that may be opened so; else close it and raise `OutputError`."""
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (found.st_nlink <= 1 or not flags & _WRITES):
        return descriptor
    os.close(descriptor)
    why = "has a second name (a hard link)" if stat.S_ISREG(found.st_mode) else "is no regular file"
    raise OutputError(f"{path}: {why}; mergemill does not write into it: move it away, or choose another folder")


def _check_removable(name: str, folder: int, path: Path) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise OutputError(f"{path}: is a folder, where mergemill has files only; move it away, and try again")


def _linked(path: Path) -> OutputError:
    return OutputError(
        f"{path}: is a link, or lies behind one, and mergemill follows none below an output; "
        "remove the link, or choose another folder"
    )

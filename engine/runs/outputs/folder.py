"""An output on a disk, from its first byte to the commit, and what is left of it when a merge is given up.

All unfinished work lies in the hidden folder ``.mergemill``: ``plan.json`` (what is being merged), ``journal.jsonl``
(receipts), the shards as ``<name>.tmp-<digest>``. At commit the shards are renamed into the output, the small files
written, the index last: only then does a loader find a model.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.runs.outputs.lease import RENEW_S
from mergemill.engine.runs.outputs.notes import FileNotes
from mergemill.engine.runs.outputs.receipts import Journal, Receipt
from mergemill.engine.runs.outputs.record import Record, checksum, make_record, parse_record, read_small
from mergemill.engine.runs.outputs.target import FileTarget, Target
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage.positioned import (
    beside_path,
    check_space,
    create_positioned,
    make_folder,
    open_positioned,
    rename_file,
    sync_folder,
    write_file,
)
from mergemill.engine.storage.ranges import Pin, pin_file

STATE_NAME = ".mergemill"


class FolderOutput:
    """The places in an output folder, and what is done with them: see `Output`."""

    beside_bytes = 0  # of memory for a part, beside what merging it takes

    def __init__(self, folder: Path, where: str | None = None) -> None:
        self.folder = folder
        self._where = where or str(folder)
        self.state = folder / STATE_NAME
        self.record_path = self.state / "plan.json"
        self.journal = Journal(self.state / "journal.jsonl")
        self.notes = FileNotes(self.state)

    def __str__(self) -> str:
        """Where it is, as the user wrote it."""
        return self._where

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Whether they see the folder is asked later, once there is a file in it."""

    def read_record(self) -> Record | None:
        """Return what the folder is the output of."""
        return parse_record(self.record_path.read_bytes(), str(self.record_path)) if self.record_path.exists() else None

    def unfinished(self, shard_name: str, digest: str) -> Path:
        """Where a shard lies until the commit."""
        return self.state / f"{shard_name}.tmp-{digest[:12]}"

    def finished(self, shard_name: str) -> Path:
        """Where a shard lies after the commit."""
        return self.folder / shard_name

    def find_shard(self, shard_name: str, digest: str) -> Path:
        """Return where a started shard lies now: unfinished, or renamed already by an interrupted commit."""
        unfinished = self.unfinished(shard_name, digest)
        return unfinished if unfinished.exists() else self.finished(shard_name)

    def find(self, name: str) -> Pin | None:
        """Return the pin of a file of the finished output."""
        return pin_file(self.folder / name) if (self.folder / name).is_file() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output for this process; `OutputError` while another one does."""
        with _open_lock(self.state / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"{self}: another mergemill is writing here; wait for it or stop it") from error
            with _renewed(file):
                yield

    def open(self, plan: Plan) -> None:
        """Make the folder the output of `plan`, new or resumed; `OutputError` where it holds anything else."""
        if not self.record_path.exists():
            _check_free(self.folder)
        make_folder(self.state)

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Create what is missing of the plan's record and shards; returns the receipts that can still be trusted."""
        if not self.record_path.exists():
            write_file(self.record_path, make_record(plan).to_json())
        paths = {shard.name: self.unfinished(shard.name, plan.digest) for shard in plan.shards}
        unfinished = [shard for shard in plan.shards if paths[shard.name].exists() or not _is_finished(self, shard)]
        lost = {shard.name for shard in unfinished if not _has_size(paths[shard.name], shard.size_bytes)}
        for shard in unfinished:
            _check_absent(self.finished(shard.name))
        check_space(self.state, sum(_lacking_bytes(paths[shard.name], shard.size_bytes) for shard in unfinished))
        for shard in unfinished:
            # Also where the file is there: parts have receipts, but a header lost in a power cut has none.
            create_positioned(paths[shard.name], shard.size_bytes, shard.header)
        numbers = {(part.start_bytes, plan.shards[part.shard].name): part for part in plan.parts}
        return {
            receipt.part: receipt
            for receipt in self.journal.read()
            if receipt.shard not in lost and (receipt.start_bytes, receipt.shard) in numbers
        }

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each part of the started plan is written."""
        files = [FileTarget(self.find_shard(shard.name, plan.digest).absolute()) for shard in plan.shards]
        return [files[part.shard] for part in plan.parts]

    def files_seen(self) -> Mapping[str, int]:
        """Return files that every worker must see, sizes in bytes by path."""
        record = self.record_path.absolute()  # there now; so is the folder, if workers share it
        return {str(record): record.stat().st_size}

    def commit(self, plan: Plan) -> None:
        """Turn finished parts into a checkpoint: sync and rename the shards, write the files, the index last."""
        for shard in plan.shards:
            unfinished = self.unfinished(shard.name, plan.digest)
            if unfinished.exists():
                with open_positioned(unfinished) as writer:
                    writer.sync()
                _check_absent(self.finished(shard.name))
                rename_file(unfinished, self.finished(shard.name))
        sync_folder(self.folder)
        for file in plan.files:
            _write_small(self.folder / file.name, read_small(file))
        self.journal.append_commit()

    def abort(self) -> int:
        """Remove what an unfinished merge left; returns the bytes freed. Nothing else is touched."""
        self._check_unfinished()
        with self.locked():
            self._check_unfinished()  # again: a driver may just have finished it
            left = _list_left(self, self.read_record())
            freed_bytes = sum(path.stat().st_blocks * 512 for path in left)
            for path in left:
                path.unlink()
            for place in (self.state, self.folder):
                _remove_empty(place)
        return freed_bytes

    def _check_unfinished(self) -> None:
        """Raise `OutputError` unless there is an unfinished merge."""
        if not self.state.is_dir():
            raise OutputError(f"{self}: holds no unfinished merge; there is nothing to abort")
        if self.journal.is_committed():
            raise OutputError(f"{self}: is a finished merge; remove the folder yourself if you do not want it")


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the output must be a folder, new or empty")
    found = sorted(path.name for path in folder.iterdir() if path.name != STATE_NAME) if folder.exists() else []
    if found:
        raise OutputError(f"{folder}: holds {found[0]!r}{_more(found)}; the output must be a folder, new or empty")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _open_lock(path: Path) -> TextIO:
    try:
        return open(path, "w")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; choose a folder that you can write") from error


@contextmanager
def _renewed(file: TextIO) -> Iterator[None]:
    """Give the lock a new time now and then: other machines may not see that it is held, but that it is old."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # the merge itself will say what is wrong with the disk
                os.utime(file.fileno())

    keeper = threading.Thread(target=renew, name="mergemill-lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _is_finished(output: FolderOutput, shard: Shard) -> bool:
    """Whether an interrupted commit has renamed the shard already; a file of the user's has another header."""
    path = output.finished(shard.name)
    return _has_size(path, shard.size_bytes) and _begins_with(path, shard.header)


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _begins_with(path: Path, header: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _lacking_bytes(path: Path, size_bytes: int) -> int:
    """What the disk must still give for a file of `size_bytes`, which may be there with holes."""
    held_bytes = path.stat().st_blocks * 512 if path.exists() else 0
    return max(0, size_bytes - held_bytes)


def _check_absent(path: Path) -> None:
    """A file that somebody else put where a shard belongs is not overwritten."""
    if path.exists():
        raise _appeared(path)


def _appeared(path: Path) -> OutputError:
    return OutputError(f"{path}: appeared while the merge ran; move it away and run the merge again to finish")


def _write_small(path: Path, data: bytes) -> None:
    """Write a small file; one that somebody else put there in the meantime is not overwritten."""
    if path.exists():
        if path.read_bytes() == data:
            return
        raise _appeared(path)
    make_folder(path.parent)  # of a file of methods in a folder below the recipe's
    write_file(path, data)


def _list_left(output: FolderOutput, record: Record | None) -> list[Path]:
    """List what is ours, the record late: an abort that is interrupted can be repeated. The lock last: it is held."""
    left: list[Path] = []
    if record is not None:
        # An interrupted commit has put some of these into the output: the index first, so that no loader finds it.
        for name, sum_ in reversed(list(record.files.items())):
            path = output.folder / name
            left += [path] if _holds(path, sum_) else []
            left += [beside] if (beside := beside_path(path)).is_file() else []
        for name, shard in record.shards.items():
            path, text = output.folder / name, shard["header"].encode()
            header = len(text).to_bytes(8, "little") + text
            left += [path] if _has_size(path, shard["size_bytes"]) and _begins_with(path, header) else []
    late = [output.record_path, output.state / "lock"]
    state = sorted(path for path in output.state.iterdir() if path.is_file())
    return left + sorted(state, key=lambda path: late.index(path) + 1 if path in late else 0)


def _holds(path: Path, expected: str) -> bool:
    return path.is_file() and checksum(path.read_bytes()) == expected


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if not folder.exists() or any(folder.iterdir()):
            return
        raise StorageError(f"{folder}: removing it failed: {error.strerror}") from error

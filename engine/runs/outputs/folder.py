"""An output on a disk, from its first byte to the commit, and what is left of it when a merge is given up.

All unfinished work lies in the hidden folder ``.mergemill``: ``plan.json`` (what is being merged), ``journal.jsonl``
(receipts), the shards as ``<name>.tmp-<digest>``. At commit the shards are renamed into the output, the small files
written, the index last: only then does a loader find a model.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import OutputError, RunError, StorageError
from mergemill.engine.plan.values import Plan, Shard, SmallFile
from mergemill.engine.runs.outputs.free import check_free, check_place, find_lowest
from mergemill.engine.runs.outputs.lease import RENEW_S
from mergemill.engine.runs.outputs.notes import FileNotes
from mergemill.engine.runs.outputs.receipts import Journal, Receipt, keep_planned
from mergemill.engine.runs.outputs.record import (
    Record,
    add_files,
    checksum,
    hide_places,
    list_ranges,
    make_record,
    parse_record,
    parse_sound,
    read_header_text,
    read_small,
)
from mergemill.engine.runs.outputs.replaced import KEPT, check_all_ours
from mergemill.engine.runs.outputs.state import JOURNAL_NAME, LOCK_NAME, RECORD_NAME, check_own, flatten_name, is_own
from mergemill.engine.runs.outputs.target import FileTarget, Target
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage import system
from mergemill.engine.storage.beneath import UNFINISHED, Beneath, name_beside
from mergemill.engine.storage.positioned import (
    check_space,
    create_positioned,
    make_folder,
    open_positioned,
    rename_file,
    sync_folder,
)
from mergemill.engine.storage.ranges import Pin, pin_file
from mergemill.engine.storage.store import ENVIRONMENT, Storage


class FolderOutput:
    """The places in an output folder, and what is done with them: see `Output`."""

    beside_bytes = 0  # of memory for a part, beside what merging it takes

    def __init__(self, folder: Path, where: str | None = None, storage: Storage = ENVIRONMENT) -> None:
        self.storage = storage
        self.folder = folder
        self._where = where or str(folder)
        self._files = Beneath(folder)
        self._lock: os.stat_result | None = None  # what is held
        self.state = folder / STATE_NAME
        self.journal = Journal(self._files, JOURNAL_NAME)
        self.notes = FileNotes(self._files, STATE_NAME)

    def __str__(self) -> str:
        """Where it is, as the user wrote it."""
        return self._where

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Whether they see the folder is asked later, once there is a file in it."""

    def read_record(self) -> Record | None:
        """Return what the folder is the output of."""
        data = self._files.read(RECORD_NAME)
        place = str(self._files.place(RECORD_NAME))
        return None if data is None else parse_record(data, place, self.journal.is_committed)

    def has_record(self) -> bool:
        """Whether that is noted, be it damaged."""
        return self._files.find(RECORD_NAME) is not None

    def write_record(self, plan: Plan) -> None:
        """Note what the folder becomes the output of, unless that is noted, and begin the journal."""
        if self._files.find(RECORD_NAME) is None:
            self._files.write(RECORD_NAME, make_record(plan, self.storage).to_json(), beside=STATE_NAME)
        self.journal.create()

    def unfinished(self, shard_name: str, digest: str) -> Path:
        """Where a shard lies until the commit."""
        return self._files.place(self._name_unfinished(shard_name, digest))

    def finished(self, shard_name: str) -> Path:
        """Where a shard lies after the commit."""
        return self.folder / shard_name

    def find_shard(self, shard_name: str, digest: str) -> Path:
        """Return where a started shard lies now: unfinished, or renamed already by an interrupted commit."""
        unfinished = self._name_unfinished(shard_name, digest)
        return self._files.place(unfinished if self._files.find_file(unfinished) else shard_name)

    def find(self, name: str) -> Pin | None:
        """Return the pin of a file of the finished output."""
        return pin_file(self.folder / name, self.storage) if (self.folder / name).is_file() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output for this process; `OutputError` while another one does."""
        try:
            descriptor = self._files.open(LOCK_NAME, os.O_RDWR | os.O_CREAT)
        except StorageError as error:
            raise OutputError(f"{error}; choose a folder that you can write") from error
        with open(descriptor, "r+b"):
            try:
                system.lock(descriptor, wait=False)
            except OSError as error:
                raise OutputError(f"{self}: another mergemill is writing here; wait for it or stop it") from error
            self._lock = os.fstat(descriptor)
            with _renewed(descriptor):
                yield

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where the folder holds anything else."""
        check_place(self.folder, self._list_names(plan))
        begun = self._files.find_folder(STATE_NAME)
        if not begun or self.read_record() is None:
            check_free(self.folder)
        if begun:
            check_own(self._files.list_names(STATE_NAME), self.read_record(), str(self))

    def check_room(self, plan: Plan) -> None:
        """Raise `StorageError` where the disk has no room for what is still to be written."""
        check_space(find_lowest(self.folder), self._count_all_lacking(plan, plan.shards))

    def open(self, plan: Plan) -> None:
        """Make the folder the output of `plan`, new or resumed."""
        self.check(plan)
        make_folder(self.state)

    def make_state(self) -> None:
        """Make the folder for unfinished work; `OutputError` where another's is in its place."""
        if self._files.find_folder(STATE_NAME):
            check_own(self._files.list_names(STATE_NAME), self.read_record(), str(self))
        make_folder(self.state)

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Create what is missing of the plan's record and shards; returns the receipts that can still be trusted."""
        self.write_record(plan)
        names = {shard.name: self._name_unfinished(shard.name, plan.digest) for shard in plan.shards}
        unfinished = [
            shard for shard in plan.shards if self._files.find(names[shard.name]) or not self._is_whole(shard)
        ]
        lost = {shard.name for shard in unfinished if not self._has_size(names[shard.name], shard.size_bytes)}
        for shard in unfinished:
            self._check_absent(shard.name)
        check_space(self.state, self._count_all_lacking(plan, unfinished))
        for shard in unfinished:
            # Also where the file is there: parts have receipts, but a header lost in a power cut has none.
            os.close(self._files.open(names[shard.name], os.O_WRONLY | os.O_CREAT))
            create_positioned(self._files.place(names[shard.name]), shard.size_bytes, shard.header)
        known = keep_planned(self.journal.read(), list_ranges(plan))
        return {number: receipt for number, receipt in known.items() if receipt.shard not in lost}

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each part of the started plan is written."""
        files = [FileTarget(self.find_shard(shard.name, plan.digest).absolute()) for shard in plan.shards]
        return [files[part.shard] for part in plan.parts]

    def files_seen(self) -> Mapping[str, int]:
        """Return files that every worker must see, sizes in bytes by path."""
        record = self._files.place(RECORD_NAME).absolute()  # there now; so is the folder, if workers share it
        return {str(record): record.stat().st_size}

    def commit(self, plan: Plan) -> None:
        """Turn finished parts into a checkpoint: sync and rename the shards, write the files, the index last.

        No loader takes any step of it for a model: those that go by an index find none, those that take whatever
        shards there are need config.json, which comes after the last of them, and mergemill asks the journal.
        """
        held = self.check_recorded(plan)
        if (record := add_files(held, plan)) is not held:  # before they are there: an abort must know them
            self._files.write(RECORD_NAME, record.to_json(), beside=STATE_NAME)
        for shard in plan.shards:
            name = self._name_unfinished(shard.name, plan.digest)
            if self._has_size(name, shard.size_bytes):
                unfinished = self._files.place(name)
                with open_positioned(unfinished) as writer:
                    writer.sync()
                self._check_absent(shard.name)
                if parent := shard.name.rpartition("/")[0]:
                    self._files.make_folder(parent)
                rename_file(unfinished, self.finished(shard.name))
            elif not self._is_whole(shard):
                raise _gone(self._files.place(name))
        for parent in sorted({shard.name.rpartition("/")[0] for shard in plan.shards} | {""}):
            sync_folder(self.folder / parent)
        for file in plan.files:
            self._write_small(file)
        self._files.write(RECORD_NAME, hide_places(record).to_json(), beside=STATE_NAME)

    def mark_committed(self) -> None:
        """Note that the output is whole; of what a driver that was killed had begun to note, nothing is left beside."""
        for name in self.list_state():
            if UNFINISHED in name:
                self._files.remove(f"{STATE_NAME}/{name}")
        self.journal.append_commit()

    def check_recorded(self, plan: Plan) -> Record:
        """Return what was noted of this merge; `RunError` where it is not there: nobody could verify the output."""
        held, found = self._lock, self._files.find(LOCK_NAME)
        if held is not None and (found is None or not os.path.samestat(held, found)):
            raise _gone(self._files.place(LOCK_NAME))
        record = self.read_record()
        if record is None or record.digest != plan.digest:
            raise _gone(self._files.place(RECORD_NAME))
        lacking = len(plan.parts) - len(keep_planned(self.journal.read(), list_ranges(plan)))
        if lacking:
            journal = self._files.place(JOURNAL_NAME)
            raise RunError(
                f"{journal}: has lost the receipts of {lacking} of {len(plan.parts)} parts while the merge ran; "
                "nothing was committed: run the same merge again"
            )
        return record

    def list_state(self) -> list[str]:
        """Return the names of mergemill's own files in its folder, relative to that."""
        names, record = self._files.list_names(STATE_NAME), self._read_sound_record()
        return [name for name in names if is_own(name, record)]

    def discard(self) -> None:
        """Remove mergemill's own files and the folders that are empty then; the lock last: it is held."""
        late = [f"{STATE_NAME}/{name}" for name in self.list_state()]
        for name in sorted(late, key=lambda name: _LATE.index(name) if name in _LATE else -1):
            self._files.remove(name)
        for name in (STATE_NAME, "."):
            self._remove_empty(name)

    def list_replaced(self, plan: Plan) -> Sequence[str]:
        """Return the files of a finished merge that gives way to `plan`, its seal first: see `Output`."""
        record = self.read_record()
        assert record is not None, "a finished merge has a record"
        ours = self._list_committed(record)
        check_all_ours(ours, self._list_all(), record, str(self))
        freed_bytes = sum(record.shards[name]["size_bytes"] for name in ours if name in record.shards)
        check_space(self.folder, sum(shard.size_bytes for shard in plan.shards) - freed_bytes)
        return ours

    def clear(self, plan: Plan) -> None:
        """Remove a finished merge that gives way to `plan`: see `Output`."""
        ours = self.list_replaced(plan)
        for name in ours:
            self._files.remove(name)
        for parent in sorted({name.rpartition("/")[0] for name in ours} - {""}, reverse=True):
            self._files.remove_folder(parent)
        notes = [name for name in self.list_state() if name not in KEPT]
        for name in sorted(notes, key=lambda name: f"{STATE_NAME}/{name}" == RECORD_NAME):
            self._files.remove(f"{STATE_NAME}/{name}")
        self._files.sync(STATE_NAME)

    def _list_all(self) -> list[str]:
        """Return all names below the folder, mergemill's notes aside; links are names, wherever they lead."""
        found = []
        for place, folders, files in os.walk(self.folder):
            if place == str(self.folder):
                folders[:] = [name for name in folders if name != STATE_NAME]
            links = [name for name in folders if (Path(place) / name).is_symlink()]
            found += [(Path(place) / name).relative_to(self.folder).as_posix() for name in (*files, *links)]
        return found

    def abort(self, *, replaced: bool = False) -> int:
        """Remove what an unfinished merge left; returns the bytes freed. Nothing else is touched."""
        self._check_unfinished(replaced)
        with self.locked():
            self._check_unfinished(replaced)  # again: a driver may just have finished it
            record = self._read_sound_record()
            left = self._list_committed(record) if record else []
            state = [f"{STATE_NAME}/{name}" for name in self.list_state()]
            freed_bytes = sum(_blocks(self._files.find_file(name)) for name in [*left, *state])
            for name in left:
                self._files.remove(name)
            names = [*record.files, *record.shards] if record else []
            for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
                self._files.remove_folder(folder)
            self.discard()
        return freed_bytes

    def _check_unfinished(self, replaced: bool) -> None:
        """Raise `OutputError` unless there is an unfinished merge, or a finished one that is `replaced` in part."""
        if not self._files.find_folder(STATE_NAME):
            raise OutputError(f"{self}: holds no unfinished merge; there is nothing to abort")
        check_own(self._files.list_names(STATE_NAME), self._read_sound_record(), str(self))
        if self.journal.is_committed() and not replaced:
            raise OutputError(f"{self}: is a finished merge; remove the folder yourself if you do not want it")

    def _read_sound_record(self) -> Record | None:
        """Return what the folder is the output of; None where that is damaged, too."""
        return parse_sound(self._files.read(RECORD_NAME))

    def _list_committed(self, record: Record) -> list[str]:
        """List what an interrupted commit has put into the output: the index first, so that no loader finds it."""
        files = [name for name, sum_ in record.files.items() if self._holds(name, sum_)]
        shards = [
            name
            for name, shard in record.shards.items()
            if self._has_size(name, shard["size_bytes"]) and self._begins_with(name, read_header_text(shard["header"]))
        ]
        return [*files[::-1], *shards]

    def _list_names(self, plan: Plan) -> Iterator[str]:
        """Yield every name below the folder that the merge gives to a file, also until that is whole."""
        for shard in plan.shards:
            yield from (shard.name, self._name_unfinished(shard.name, plan.digest))
        for name in (*(file.name for file in plan.files), RECORD_NAME):
            yield from (name, name_beside(name, STATE_NAME))

    def _name_unfinished(self, shard_name: str, digest: str) -> str:
        return f"{STATE_NAME}/{flatten_name(shard_name)}.tmp-{digest[:12]}"

    def _is_whole(self, shard: Shard) -> bool:
        """Whether an interrupted commit has renamed the shard already; a file of the user's has another header."""
        return self._has_size(shard.name, shard.size_bytes) and self._begins_with(shard.name, shard.header)

    def _has_size(self, name: str, size_bytes: int) -> bool:
        found = self._files.find_file(name)
        return found is not None and found.st_size == size_bytes

    def _begins_with(self, name: str, header: bytes) -> bool:
        with open(self._files.open(name, os.O_RDONLY), "rb") as file:
            return file.read(len(header)) == header

    def _holds(self, name: str, expected: str) -> bool:
        return self._files.find_file(name) is not None and checksum(self._files.read_pieces(name)) == expected

    def _count_all_lacking(self, plan: Plan, shards: Sequence[Shard]) -> int:
        """Return what the disk must still give for shards, also where an interrupted commit has renamed some."""
        return sum(
            min(self._count_lacking(name, shard.size_bytes) for name in (shard.name, unfinished))
            for shard in shards
            for unfinished in [self._name_unfinished(shard.name, plan.digest)]
        )

    def _count_lacking(self, name: str, size_bytes: int) -> int:
        """Return what the disk must still give for a file of `size_bytes`, which may be there with holes."""
        return max(0, size_bytes - _blocks(self._files.find_file(name)))

    def _check_absent(self, name: str) -> None:
        """A file, or a link, that somebody else put where a shard belongs is not overwritten."""
        if self._files.find(name) is not None:
            raise _appeared(self._files.place(name))

    def _write_small(self, file: SmallFile) -> None:
        """Write a small file, in pieces; what somebody else put there in the meantime is not overwritten."""
        pieces = read_small(file, self.storage)
        if self._files.find(file.name) is None:
            self._files.write(file.name, pieces, beside=STATE_NAME)
        elif not self._holds(file.name, checksum(pieces)):
            raise _appeared(self._files.place(file.name))

    def _remove_empty(self, name: str) -> None:
        if name != ".":
            self._files.remove_folder(name)
        elif self.folder.is_dir() and not self.folder.is_symlink() and not any(self.folder.iterdir()):
            try:
                self.folder.rmdir()
            except OSError as error:
                raise StorageError(f"{self.folder}: removing it failed: {error.strerror}") from error


_LATE = (RECORD_NAME, LOCK_NAME)  # the record late: an abort that is interrupted can be repeated


@contextmanager
def _renewed(descriptor: int) -> Iterator[None]:
    """Give the lock a new time now and then: other machines may not see that it is held, but that it is old."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):  # the merge itself will say what is wrong with the disk
                os.utime(descriptor)

    keeper = threading.Thread(target=renew, name="mergemill-lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _appeared(path: Path) -> OutputError:
    return OutputError(f"{path}: appeared while the merge ran; move it away and run the merge again to finish")


def _gone(path: Path) -> RunError:
    return RunError(
        f"{path}: was removed or replaced while the merge ran; nothing was committed: run the same merge again"
    )


def _blocks(found: os.stat_result | None) -> int:
    """Return the bytes that a file takes on the disk."""
    return 0 if found is None else found.st_blocks * 512

"""What outputs in object storage have in common: their record, receipts and lease lie beside the shards as objects.

All of it lies below ``.mergemill/``: ``plan.json`` (what is being merged), ``journal/`` (receipts, some in each
object), ``committed``, ``lock``, ``driver.json``. Nothing is kept on any disk, so a merge can be resumed from another
machine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import Absent, OutputError, RunError, StorageError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.runs.outputs.lease import Lease, hold_lease
from mergemill.engine.runs.outputs.notes import ObjectNotes
from mergemill.engine.runs.outputs.object_journal import ObjectJournal
from mergemill.engine.runs.outputs.record import (
    Record,
    add_files,
    checksum,
    hide_places,
    parse_record,
    parse_sound,
    take_small,
)
from mergemill.engine.runs.outputs.replaced import KEPT, check_all_ours
from mergemill.engine.runs.outputs.state import RECORD_NAME, check_own, is_own
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage.bounds import COPIED_BYTES
from mergemill.engine.storage.objects import Objects
from mergemill.engine.storage.ranges import Pin, join, pin_file, read_beginning, read_pieces
from mergemill.engine.storage.store import Storage


class RemoteOutput:
    """The objects of an output but for its shards: see `Output`."""

    def __init__(self, where: str, url: str, objects: Objects, storage: Storage) -> None:
        self.storage = storage
        self._where = where
        self._url = url
        self._objects = objects
        self._record_url = self._place(RECORD_NAME)
        self._lease: Lease | None = None
        self.journal = ObjectJournal(objects, self._place(STATE_NAME))
        self.notes = ObjectNotes(objects, self._place(STATE_NAME))

    def __str__(self) -> str:
        """Where it is, as the user wrote it."""
        return self._where

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Workers anywhere can write to it."""

    def read_record(self) -> Record | None:
        """Return what the place is the output of."""
        text = self._objects.get(self._record_url, error=OutputError)
        return None if text is None else parse_record(text, self._record_url, self.journal.is_committed)

    def open(self, plan: Plan) -> None:
        """Nothing is made before the plan is started; the check is all."""
        self.check(plan)

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where the place holds anything else."""
        found = self._objects.list_objects(self._url, error=OutputError)
        foreign = sorted(name for name in found if not name.startswith(f"{STATE_NAME}/"))
        if foreign and RECORD_NAME not in found:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise OutputError(f"{self}: holds {foreign[0]!r}{more}; the output must be a prefix, new or empty")
        if RECORD_NAME not in found:
            self._check_own(found, None)
            if any("/journal/" in name or name.endswith(("/uploads.json", "/committed")) for name in found):
                raise OutputError(
                    f"{self}: holds receipts, and no plan that says of what; remove them with: mergemill abort {self}"
                )

    def check_room(self, plan: Plan) -> None:
        """Object stores do not fill up."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output for this process; `OutputError` while another one does."""
        with hold_lease(self._objects, self._place(STATE_NAME, "lock"), str(self)) as self._lease:
            try:
                yield
            finally:
                with suppress(StorageError):  # parts without a receipt are merged again
                    self.journal.flush()

    def files_seen(self) -> Mapping[str, int]:
        """No file of a disk."""
        return {}

    def find(self, name: str) -> Pin | None:
        """Return the pin of an object of the output."""
        try:
            return pin_file(self._place(name), self.storage)
        except Absent:
            return None

    def _begin_commit(self, plan: Plan) -> None:
        """Raise unless the output is still held and noted, and write all receipts: nothing else tells of its shards."""
        assert self._lease is not None
        self._lease.check()
        self.journal.flush()
        record = self.read_record()
        lost = self.journal.find_lost()
        if record is None or record.digest != plan.digest or lost is not None:
            raise self._gone(lost or self._record_url)
        if (complete := add_files(record, plan)) is not record:  # before they are there: an abort must know them
            self._objects.put(self._record_url, complete.to_json())

    def _check_own(self, found: Iterable[str], record: Record | None) -> None:
        state = [name.removeprefix(f"{STATE_NAME}/") for name in found if name.startswith(f"{STATE_NAME}/")]
        check_own(state, record, str(self))

    def _read_sound_record(self) -> Record | None:
        """Return what the place is the output of; None where that is damaged, too."""
        return parse_sound(self._objects.get(self._record_url, error=OutputError))

    def _find_finished(self, plan: Plan) -> set[str]:
        """Return the shards that an interrupted commit has finished; `OutputError` for another object of that name."""
        there = self._objects.list_objects(self._url)
        found = [shard for shard in plan.shards if shard.name in there]
        finished = {shard.name for shard in found if self._is_finished(shard)}
        if foreign := [shard.name for shard in found if shard.name not in finished]:
            raise self._appeared(foreign[0])
        return finished

    def _place(self, *names: str) -> str:
        return join(self._url, "/".join(names))

    def _is_finished(self, shard: Shard) -> bool:
        """Whether an interrupted commit has finished the shard already; an object of the user's has another header."""
        pin = self.find(shard.name)
        return pin is not None and pin.size_bytes == shard.size_bytes and begins_with(pin, shard.header, self.storage)

    def _check_absent(self, name: str) -> None:
        if self.find(name) is not None:
            raise self._appeared(name)

    def _gone(self, url: str) -> RunError:
        return RunError(
            f"{url}: was removed or replaced while the merge ran; nothing was committed: run the same merge again"
        )

    def _appeared(self, name: str) -> OutputError:
        place = self._place(name)
        return OutputError(f"{place}: appeared while the merge ran; move it away and run the merge again to finish")

    def _commit_files(self, plan: Plan) -> None:
        """Write the small files, the index last, and hide what tells of this machine."""
        for file in plan.files:
            # One that somebody else put there in the meantime is not overwritten.
            if not self._objects.put(self._place(file.name), take_small(file, self.storage), absent=True):
                raise self._appeared(file.name)
        record = self.read_record()
        if record is None:
            raise self._gone(self._record_url)
        self._objects.put(self._record_url, hide_places(record).to_json())

    def mark_committed(self) -> None:
        """Note that the output is whole."""
        self.journal.append_commit()

    def list_replaced(self, plan: Plan) -> Sequence[str]:
        """Return the objects of a finished merge that gives way to `plan`, its seal first: see `Output`."""
        record = self.read_record()
        assert record is not None, "a finished merge has a record"
        there = self._objects.list_objects(self._url, error=OutputError)
        found = [name for name in there if not name.startswith(f"{STATE_NAME}/")]
        ours = self._list_ours(there, record)
        check_all_ours(ours, found, record, str(self))
        return ours

    def clear(self, plan: Plan) -> None:
        """Remove a finished merge that gives way to `plan`: see `Output`."""
        ours = self.list_replaced(plan)
        there = self._objects.list_objects(self._url, error=OutputError)
        kept = [f"{STATE_NAME}/{name}" for name in KEPT]
        notes = [name for name in self._list_state(there, self.read_record()) if name not in kept]
        notes.sort(key=lambda name: name == RECORD_NAME)
        self._objects.delete([self._place(name) for name in [*ours, *notes]])
        self.journal = ObjectJournal(self._objects, self._place(STATE_NAME))

    def _list_for_abort(self, replaced: bool) -> Mapping[str, int]:
        """Return the sizes of all objects by name; `OutputError` unless an unfinished merge is among them.

        replaced: a finished one is, which is removed in part.
        """
        found = self._objects.list_objects(self._url, error=OutputError)
        if not any(name.startswith(f"{STATE_NAME}/") for name in found):
            raise OutputError(f"{self}: holds no unfinished merge; there is nothing to abort")
        self._check_own(found, self._read_sound_record())
        if self.journal.is_committed() and not replaced:
            raise OutputError(f"{self}: is a finished merge; remove the objects yourself if you do not want them")
        return found

    def _remove(self, found: Mapping[str, int]) -> int:
        """Remove what is ours of the objects `found`, sizes by name; returns the bytes of shards and small files."""
        record = self._read_sound_record()
        ours = [] if record is None else self._list_ours(found, record)
        state = [name for name in self._list_state(found, record) if not name.endswith("/lock")]
        state.sort(key=lambda name: name == RECORD_NAME)  # the record last: an abort can be repeated
        self._objects.delete([self._place(name) for name in [*ours, *state]])
        return sum(found[name] for name in ours)

    def _list_ours(self, found: Mapping[str, int], record: Record) -> list[str]:
        """Return what a commit has written: the index first, so that no loader finds the rest."""
        ours = [name for name in found if self._is_ours(name, found[name], record)]
        late = {name: place for place, name in enumerate([*record.files][::-1])}
        return sorted(ours, key=lambda name: late.get(name, len(late)))

    def _list_state(self, found: Iterable[str], record: Record | None) -> list[str]:
        """Return those of the names that are mergemill's own notes and unfinished shards."""
        start = f"{STATE_NAME}/"
        return [name for name in found if name.startswith(start) and is_own(name.removeprefix(start), record)]

    def _is_ours(self, name: str, size_bytes: int, record: Record) -> bool:
        """Whether an interrupted commit wrote the object."""
        if name in record.files:
            return size_bytes <= COPIED_BYTES and self._holds(name, record.files[name])
        shard = record.shards.get(name)
        return shard is not None and size_bytes == shard["size_bytes"] and self._begins_as_planned(name, record)

    def _holds(self, name: str, expected: str) -> bool:
        """Whether a small file is there and has such a checksum."""
        pin = self.find(name)
        return pin is not None and checksum(read_pieces(pin, storage=self.storage)) == expected

    def _begins_as_planned(self, name: str, record: Record) -> bool:
        text = record.shards[name]["header"].encode()
        pin = self.find(name)
        return pin is not None and begins_with(pin, len(text).to_bytes(8, "little") + text, self.storage)


def begins_with(pin: Pin, header: bytes, storage: Storage) -> bool:
    """Whether a file begins so."""
    return read_beginning(pin, len(header), storage) == header

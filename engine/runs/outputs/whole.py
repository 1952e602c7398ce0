"""An output in any storage that fsspec can write: a task merges a whole shard and streams it there, front to back.

Where files can be renamed, a shard lies below ``.mergemill/`` until the commit, under a name of its attempt: a worker
that outlives its driver may still write to an earlier one. An object store would copy a shard to rename it, so there it
has its own name at once, and appears when it is whole. Shards alone are no model to a loader: the index is the last.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import OutputError, RunError
from mergemill.engine.plan.values import Part, Plan
from mergemill.engine.runs.outputs.receipts import Receipt, Upload, keep_planned
from mergemill.engine.runs.outputs.record import Record, list_ranges, make_record
from mergemill.engine.runs.outputs.remote import RemoteOutput, begins_with
from mergemill.engine.runs.outputs.state import RECORD_NAME
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage import streams
from mergemill.engine.storage.any_objects import AnyObjects
from mergemill.engine.storage.ranges import join
from mergemill.engine.storage.store import Storage
from mergemill.engine.storage.streams import BESIDE_BYTES, MOST_BYTES, UNFINISHED, Stream, open_stream


class WholeOutput(RemoteOutput):
    """The files of an output, and what is done with them: see `Output`."""

    beside_bytes = BESIDE_BYTES

    def __init__(self, url: str, storage: Storage) -> None:
        streams.check_place(url)
        where = url.rstrip("/")
        super().__init__(where, where, AnyObjects(join(where, STATE_NAME), storage), storage)
        self._renames = streams.is_folder_like(url)

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Raise `OutputError` where the storage is of this process and other ones would work."""
        if streams.is_of_process(self._url) and not workers.are_threads:
            raise OutputError(f"{self}: is in the memory of this process, which no other one sees; use --workers 0")

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where the place holds anything else, or shards are larger than object stores take."""
        largest = max(plan.shards, key=lambda shard: shard.size_bytes, default=None)
        if largest and largest.size_bytes > MOST_BYTES and not self._renames:
            raise OutputError(
                f"{largest.name}: {largest.size_bytes} bytes; {MOST_BYTES} are the most that is written as one object "
                "here; choose a smaller --shard-size"
            )
        super().check(plan)

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Write the record, remove unfinished shards; returns the receipts of shards that are there, whole."""
        self._objects.put(self._record_url, make_record(plan, self.storage).to_json(), absent=True)
        receipts = keep_planned(self.journal.read(), list_ranges(plan))
        there = self._objects.list_objects(self._url)
        places = self._find_places(plan, receipts, there)
        self._check_free(plan, there)
        self._drop_unfinished(there, keep=set(places.values()))
        whole = {number for number, shard in enumerate(plan.shards) if shard.name in places}
        return {part.number: receipts[part.number] for part in plan.parts if part.shard in whole}

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each shard of the started plan is written, once for each of its parts."""
        targets = [
            WholeTarget(self._url, self.storage, shard.name, shard.header, self._renames) for shard in plan.shards
        ]
        return [targets[part.shard] for part in plan.parts]

    def files_seen(self) -> Mapping[str, int]:
        """Return the record, where it is a file of a disk that every worker must see."""
        path = streams.find_local(self._record_url, self.storage)
        return {} if path is None else {path: self._objects.list_objects(self._url)[RECORD_NAME]}

    def commit(self, plan: Plan) -> None:
        """Check that every shard is whole, give each its name, write the files, the index last."""
        self._begin_commit(plan)
        receipts = keep_planned(self.journal.read(), list_ranges(plan))
        there = self._objects.list_objects(self._url)
        places = self._find_places(plan, receipts, there)
        with_parts = dict.fromkeys(plan.shards[part.shard].name for part in plan.parts)
        if missing := [name for name in with_parts if name not in places]:
            raise RunError(f"{self._place(missing[0])}: is gone or not whole; run the same merge again to resume")
        self._check_free(plan, there)
        for shard in plan.shards:
            if shard.name not in places:  # tensors without elements
                self._objects.put(self._place(shard.name), shard.header)
            elif places[shard.name] != shard.name:
                streams.rename(self._place(places[shard.name]), self._place(shard.name), self.storage)
        self._drop_unfinished(there, keep=set(places.values()))
        self._commit_files(plan)

    def abort(self, *, replaced: bool = False) -> int:
        """Remove what an unfinished merge left; returns the bytes freed."""
        self._list_for_abort(replaced)
        with self.locked():
            found = self._list_for_abort(replaced)  # again: a driver may just have finished it
            left = [name for name in self._list_state(found, self._read_sound_record()) if UNFINISHED in name]
            freed_bytes = self._remove(found) + sum(found[name] for name in left)
        for folder in ("journal", ""):
            streams.remove_empty(self._place(STATE_NAME, folder).rstrip("/"), self.storage)
        streams.remove_empty(self._url, self.storage)
        return freed_bytes

    def _find_places(self, plan: Plan, receipts: Mapping[int, Receipt], there: Mapping[str, int]) -> dict[str, str]:
        """Return by shard where it lies whole: its parts have receipts of one attempt, and its size is right."""
        places: dict[str, str] = {}
        for number, parts in groupby(plan.parts, lambda part: part.shard):
            shard = plan.shards[number]
            names = {_find_name(receipts.get(part.number)) for part in parts}
            # The second is where an interrupted commit has renamed it to.
            found = [name for name in (*names, shard.name) if there.get(name) == shard.size_bytes]
            if found and len(names) == 1 and "" not in names:
                places[shard.name] = found[0]
        return places

    def _check_free(self, plan: Plan, there: Mapping[str, int]) -> None:
        """Raise `OutputError` where somebody else has put a file where a shard belongs."""
        record = self.read_record()
        assert record is not None
        for shard in plan.shards:
            if shard.name in there and not self._is_ours(shard.name, there[shard.name], record):
                raise self._appeared(shard.name)

    def _drop_unfinished(self, there: Mapping[str, int], keep: set[str]) -> None:
        left = [name for name in self._list_state(there, self.read_record()) if UNFINISHED in name]
        self._objects.delete([self._place(name) for name in left if name not in keep])

    def _is_ours(self, name: str, size_bytes: int, record: Record) -> bool:
        """Whether a merge wrote the file: a shard may also be the beginning of one, where that can be seen."""
        shard = record.shards.get(name)
        if shard is None or size_bytes >= shard["size_bytes"]:
            return super()._is_ours(name, size_bytes, record)
        text = shard["header"].encode()
        header, pin = len(text).to_bytes(8, "little") + text, self.find(name)
        return pin is not None and begins_with(pin, header[:size_bytes], self.storage)


@dataclass(frozen=True, slots=True)
class WholeTarget:
    """A shard of an output in any storage."""

    place: str  # the output's URL
    storage: Storage
    shard: str
    header: bytes
    renames: bool  # whether it lies under another name until the commit
    beside_bytes = BESIDE_BYTES

    @contextmanager
    def open_shard(self) -> Iterator["WholeWriter"]:
        """Create the file, or replace it; given up where the block ends before it is finished."""
        attempt = secrets.token_hex(4)
        name = f"{STATE_NAME}/{self.shard}{UNFINISHED}{attempt}" if self.renames else self.shard
        with open_stream(join(self.place, name), self.storage) as stream:
            stream.write(memoryview(self.header))
            yield WholeWriter(stream, name)

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """The shard is there and has its size, or the receipt would not be trusted."""
        return True


class WholeWriter:
    """Streams a shard to where it is stored."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._name = name
        self.write = stream.write
        self.finish = stream.finish

    def deliver(self, check_going: Callable[[], None]) -> Sequence[Upload]:
        """Return the name that the shard has until the commit."""
        return ((1, self._name),)


def _find_name(receipt: Receipt | None) -> str:
    """Return where the shard of a part lies, as its receipt says; empty where there is none."""
    return str(receipt.uploads[0][1]) if receipt is not None and receipt.uploads else ""

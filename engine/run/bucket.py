"""An output in S3: shards as multipart uploads, invisible until they are completed at the commit, the index last.

What must outlive this process lies beside them, below ``.mergemill/``: ``plan.json`` (what is being merged),
``uploads.json`` (the id of each shard's upload), ``journal/`` (receipts, some in each object), ``lock``. Nothing is
kept on any disk, so that a merge can be resumed from another machine.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from mergemill.engine.errors import CheckpointError, OutputError, RunError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.run.lease import hold_lease
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.run.record import Record, checksum, make_record, parse_record, read_small
from mergemill.engine.run.target import Target
from mergemill.engine.run.upload import BESIDE_BYTES, check_limits, make_targets
from mergemill.engine.storage import multipart
from mergemill.engine.storage.multipart import StoredPart
from mergemill.engine.storage.ranges import Pin, join, pin_file, read_whole

STATE_NAME = ".mergemill"
FLUSH_S = 1.0  # receipts that a killed driver may lose: those of the last second, whose parts are then merged again


class BucketOutput:
    """The objects of an output, and what is done with them: see `Output`."""

    beside_bytes = BESIDE_BYTES

    def __init__(self, url: str) -> None:
        self._where = url.rstrip("/")
        self._url = "s3://" + self._where.split("://", 1)[1]
        self._record_url = self._place(STATE_NAME, "plan.json")
        self._uploads_url = self._place(STATE_NAME, "uploads.json")
        self.journal = BucketJournal(self._place(STATE_NAME))
        self._uploads: dict[str, str] = {}  # of a started plan: the id of each shard's upload, where it is not finished

    def __str__(self) -> str:
        """Where it is, as the user wrote it."""
        return self._where

    def read_record(self) -> Record | None:
        """Return what the prefix is the output of."""
        text = multipart.get(self._record_url)
        return None if text is None else parse_record(text, self._record_url)

    def open(self, plan: Plan) -> None:
        """Raise `OutputError` where the prefix holds anything else."""
        check_limits(plan)
        found = multipart.list_objects(self._url)
        foreign = sorted(name for name in found if not name.startswith(f"{STATE_NAME}/"))
        if foreign and f"{STATE_NAME}/plan.json" not in found:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise OutputError(f"{self}: holds {foreign[0]!r}{more}; the output must be a prefix, new or empty")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output for this process; `OutputError` while another one does."""
        with hold_lease(self._place(STATE_NAME, "lock"), str(self)):
            try:
                yield
            finally:
                self.journal.flush()

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Begin what is missing of the uploads; returns the receipts of parts that the server still has."""
        multipart.put(self._record_url, make_record(plan).to_json(), absent=True)
        held: dict[str, str] = json.loads(multipart.get(self._uploads_url) or b"{}")
        listed = {name: multipart.list_parts(self._place(name), upload) for name, upload in held.items()}
        begun = {name for name, parts in listed.items() if parts is not None}
        finished = {shard.name for shard in plan.shards if shard.name not in begun and self._is_finished(shard)}
        for shard in plan.shards:
            if shard.name not in begun | finished:
                self._check_absent(shard.name)
                held[shard.name] = multipart.start_upload(self._place(shard.name))
        multipart.put(self._uploads_url, json.dumps(held).encode())
        self._abort_others(held)
        self._uploads = held
        return {
            receipt.part: receipt
            for receipt in self.journal.read()
            if receipt.shard in finished or _is_listed(receipt, listed.get(receipt.shard))
        }

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each part of the started plan is uploaded to."""
        urls = [self._place(shard.name) for shard in plan.shards]
        return make_targets(plan, urls, [self._uploads.get(shard.name, "") for shard in plan.shards])

    def files_seen(self) -> Mapping[str, int]:
        """No file of a disk."""
        return {}

    def commit(self, plan: Plan) -> None:
        """Complete the uploads, write the files, the index last."""
        receipts = {receipt.part: receipt for receipt in self.journal.read()}
        for number, shard in enumerate(plan.shards):
            if not self._is_finished(shard):
                parts = [receipts[part.number] for part in plan.parts if part.shard == number]
                self._complete(shard, parts)
        for file in plan.files:
            self._write_small(file.name, read_small(file))
        self.journal.append_commit()

    def find(self, name: str) -> Pin | None:
        """Return the pin of an object of the output."""
        try:
            return pin_file(self._place(name))
        except CheckpointError as error:
            if "no such" in str(error):
                return None
            raise

    def abort(self) -> int:
        """End the uploads and remove what an unfinished merge left; returns the bytes freed."""
        found = multipart.list_objects(self._url)
        if not any(name.startswith(f"{STATE_NAME}/") for name in found):
            raise OutputError(f"{self}: holds no unfinished merge; there is nothing to abort")
        if self.journal.is_committed():
            raise OutputError(f"{self}: is a finished merge; remove the objects yourself if you do not want them")
        with self.locked():
            freed_bytes = sum(_drop(url, upload) for url, upload in multipart.list_uploads(self._url))
            record = self.read_record()
            ours = [name for name in found if record is not None and self._is_ours(name, found[name], record)]
            state = [name for name in found if name.startswith(f"{STATE_NAME}/") and not name.endswith("/lock")]
            state.sort(key=lambda name: name.endswith("/plan.json"))  # the record last: an abort can be repeated
            multipart.delete([self._place(name) for name in [*ours, *state]])
        return freed_bytes + sum(found[name] for name in ours)

    def _place(self, *names: str) -> str:
        return join(self._url, "/".join(names))

    def _is_finished(self, shard: Shard) -> bool:
        """Whether an interrupted commit has completed the shard already; an object of the user's has another header."""
        pin = self.find(shard.name)
        return pin is not None and pin.size_bytes == shard.size_bytes and _begins_with(pin, shard.header)

    def _check_absent(self, name: str) -> None:
        if self.find(name) is not None:
            raise self._appeared(name)

    def _appeared(self, name: str) -> OutputError:
        place = self._place(name)
        return OutputError(f"{place}: appeared while the merge ran; move it away and run the merge again to finish")

    def _abort_others(self, held: Mapping[str, str]) -> None:
        """End uploads that were begun by a driver that died before it could note them."""
        ours = {(self._place(name), upload) for name, upload in held.items()}
        for url, upload in multipart.list_uploads(self._url):
            if (url, upload) not in ours:
                multipart.abort_upload(url, upload)

    def _complete(self, shard: Shard, receipts: Sequence[Receipt]) -> None:
        """Make the shard's object of its parts, as the server lists them."""
        url = self._place(shard.name)
        if not receipts:
            multipart.put(url, shard.header, absent=True)  # tensors without elements
            multipart.abort_upload(url, self._uploads[shard.name])
            return
        self._check_absent(shard.name)
        listed = multipart.list_parts(url, self._uploads[shard.name]) or {}
        for receipt in receipts:
            if not _is_listed(receipt, listed):
                raise RunError(f"{url}: the server has lost part {receipt.part}; run the same merge again to resume")
        parts = [
            (int(number), listed[int(number)].etag) for receipt in receipts for number, _ in receipt.uploads if listed
        ]
        if not multipart.complete_upload(url, self._uploads[shard.name], parts) and not self._is_finished(shard):
            raise RunError(f"{url}: its upload is gone; run the same merge again")

    def _write_small(self, name: str, data: bytes) -> None:
        """Write a small object; one that somebody else put there in the meantime is not overwritten."""
        if not multipart.put(self._place(name), data, absent=True) and multipart.get(self._place(name)) != data:
            raise self._appeared(name)

    def _is_ours(self, name: str, size_bytes: int, record: Record) -> bool:
        """Whether an interrupted commit wrote the object."""
        if name in record.files:
            return checksum(multipart.get(self._place(name)) or b"") == record.files[name]
        shard, pin = record.shards.get(name), self.find(name)
        if shard is None or pin is None or size_bytes != shard["size_bytes"]:
            return False
        text = shard["header"].encode()
        return _begins_with(pin, len(text).to_bytes(8, "little") + text)


class BucketJournal:
    """Receipts in objects of some each, since objects cannot be appended to."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._known: list[Receipt] | None = None
        self._waiting: list[Receipt] = []
        self._flushed_s = time.monotonic()

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        if self._known is None:
            names = sorted(multipart.list_objects(join(self._url, "journal")))
            texts = multipart.get_all([join(self._url, f"journal/{name}") for name in names])
            self._known = [Receipt(**line) for text in texts for line in json.loads(text or b"[]")]
        yield from [*self._known, *self._waiting]

    def is_committed(self) -> bool:
        """Whether the merge was finished."""
        return multipart.get(join(self._url, "committed")) is not None

    def append(self, receipt: Receipt) -> None:
        """Add a receipt; it is in the storage a second later at the latest, or once the output is let go."""
        self._waiting.append(receipt)
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the receipts that wait."""
        if self._waiting:
            lines = json.dumps([asdict(receipt) for receipt in self._waiting])
            multipart.put(join(self._url, f"journal/{time.time_ns():020d}.json"), lines.encode(), absent=True)
            self._known = [*(self._known or ()), *self._waiting] if self._known is not None else None
            self._waiting = []
        self._flushed_s = time.monotonic()

    def append_commit(self) -> None:
        """Note that the output is whole."""
        self.flush()
        multipart.put(join(self._url, "committed"), b"{}")


def _is_listed(receipt: Receipt, listed: Mapping[int, StoredPart] | None) -> bool:
    """Whether the server has all uploads of a part, as they were."""
    if listed is None or not receipt.uploads:
        return False
    return all(int(number) in listed and listed[int(number)].etag == etag for number, etag in receipt.uploads)


def _begins_with(pin: Pin, header: bytes) -> bool:
    return read_whole(pin, len(header)) == header


def _drop(url: str, upload: str) -> int:
    """End an upload; returns the bytes of its parts."""
    size_bytes = sum(part.size_bytes for part in (multipart.list_parts(url, upload) or {}).values())
    multipart.abort_upload(url, upload)
    return size_bytes

"""An output in S3: shards as multipart uploads, invisible until they are completed at the commit, the index last.

Beside what every output in object storage has there (`remote`), ``.mergemill/uploads.json`` keeps the id of each
shard's upload.
"""

import json
from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import OutputError, RunError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.runs.outputs.chunks import BESIDE_BYTES
from mergemill.engine.runs.outputs.receipts import Receipt, keep_planned
from mergemill.engine.runs.outputs.record import list_ranges, make_record
from mergemill.engine.runs.outputs.remote import RemoteOutput
from mergemill.engine.runs.outputs.state import is_shard
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.outputs.upload import check_limits, make_targets
from mergemill.engine.storage.multipart import S3Objects, StoredPart
from mergemill.engine.storage.s3 import split_url
from mergemill.engine.storage.store import Storage


class BucketOutput(RemoteOutput):
    """The objects of an output, and what is done with them: see `Output`."""

    beside_bytes = BESIDE_BYTES

    def __init__(self, url: str, storage: Storage) -> None:
        scheme, _, place = url.partition("://")
        place = place.rstrip("/")
        split_url(f"s3://{place}")  # raises for what is no URL of S3
        self._s3 = S3Objects(storage)
        super().__init__(f"{scheme}://{place}", f"s3://{place}", self._s3, storage)
        self._uploads_url = self._place(STATE_NAME, "uploads.json")
        self._uploads: dict[str, str] = {}  # of a started plan: the id of each shard's upload, where it is not finished

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where the prefix holds anything else, or S3 does not take such shards."""
        check_limits(plan)
        super().check(plan)

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Begin what is missing of the uploads; returns the receipts of parts that the server still has."""
        self._s3.put(self._record_url, make_record(plan, self.storage).to_json(), absent=True)
        known = self._read_uploads()
        listed = {name: self._s3.list_parts(self._place(name), upload) for name, upload in known.items()}
        finished = self._find_finished(plan)
        held = {name: known[name] for name, parts in listed.items() if parts is not None and name not in finished}
        for name in _list_uploaded(plan):
            if name not in held.keys() | finished:
                held[name] = self._s3.start_upload(self._place(name))
        self._s3.put(self._uploads_url, json.dumps(held).encode())
        self._abort_others(plan, held)
        self._uploads = held
        return {
            number: receipt
            for number, receipt in keep_planned(self.journal.read(), list_ranges(plan)).items()
            if receipt.shard in finished or _is_listed(receipt, listed.get(receipt.shard))
        }

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each part of the started plan is uploaded to."""
        urls = [self._place(shard.name) for shard in plan.shards]
        return make_targets(plan, self._s3, urls, [self._uploads.get(shard.name, "") for shard in plan.shards])

    def commit(self, plan: Plan) -> None:
        """Complete the uploads, write the files, the index last."""
        self._begin_commit(plan)
        finished = self._find_finished(plan)
        for number, shard in enumerate(plan.shards):
            if shard.name not in finished:
                self._complete(shard, [part.number for part in plan.parts if part.shard == number])
        self._commit_files(plan)

    def abort(self, *, replaced: bool = False) -> int:
        """End the uploads and remove what an unfinished merge left; returns the bytes freed.

        Where no plan names the shards their uploads are known by their names, as shards in a state folder are, and not
        by ``uploads.json``, which may be damaged as well, or name what is another's (decided 2026-11-29).
        """
        self._list_for_abort(replaced)
        with self.locked():
            found = self._list_for_abort(replaced)  # again: a driver may just have finished it
            record = self._read_sound_record()
            begun = list(self._s3.list_uploads(self._url))
            ours = [each for each in begun if is_shard(each[0].removeprefix(self._place("")), record)]
            freed_bytes = sum(_drop(self._s3, url, upload) for url, upload in ours)
            return freed_bytes + self._remove(found)

    def _read_uploads(self) -> dict[str, str]:
        """Return the id of each upload by the name of its shard, as an earlier run noted them."""
        return parse_uploads(self._s3.get(self._uploads_url) or b"{}", self._uploads_url, str(self))

    def _abort_others(self, plan: Plan, held: Mapping[str, str]) -> None:
        """End uploads of shards that were begun by a driver that died before it could note them."""
        ours = {self._place(shard.name): held.get(shard.name) for shard in plan.shards}
        for url, upload in self._s3.list_uploads(self._url):
            if url in ours and ours[url] != upload:
                self._s3.abort_upload(url, upload)

    def _complete(self, shard: Shard, numbers: Sequence[int]) -> None:
        """Make the shard's object of its parts, as the server lists them."""
        url = self._place(shard.name)
        if not numbers:  # tensors without elements
            if not self._s3.put(url, shard.header, absent=True):
                raise self._appeared(shard.name)
            return
        listed = self._s3.list_parts(url, self._uploads[shard.name]) or {}
        receipts = {receipt.part: receipt for receipt in self.journal.read() if _is_listed(receipt, listed)}
        if lost := sorted(set(numbers) - receipts.keys()):
            raise RunError(f"{url}: the server has lost part {lost[0]}; run the same merge again to resume")
        parts = [part for number in numbers for part in _name_parts(receipts[number])]
        if not self._s3.complete_upload(url, self._uploads[shard.name], parts) and not self._is_finished(shard):
            raise RunError(f"{url}: its upload is gone; run the same merge again to resume")


def parse_uploads(data: bytes, where: str, out: str) -> dict[str, str]:
    """Return the id of each upload by the name of its shard, from a note at `where` of the output `out`."""
    try:
        return _UPLOADS.validate_json(data, strict=True)
    except ValidationError as error:  # what is uploaded is not given up for an answer that was cut short
        raise OutputError(
            f"{where}: is damaged, or not of this version of mergemill: {error.errors()[0]['msg']}; run the same merge "
            f"again to resume, or give it up with: mergemill abort {out}"
        ) from error


def _list_uploaded(plan: Plan) -> list[str]:
    """Return the shards that have parts; one whose tensors have no elements is a header only."""
    return list(dict.fromkeys(plan.shards[part.shard].name for part in plan.parts))


def _is_listed(receipt: Receipt, listed: Mapping[tuple[int, str], StoredPart] | None) -> bool:
    """Whether the server has all uploads of a part, as they were."""
    return bool(listed and receipt.uploads and listed.keys() >= set(_name_parts(receipt)))


def _name_parts(receipt: Receipt) -> list[tuple[int, str]]:
    """Return number and ETag of each upload of a part."""
    return [(int(number), str(etag)) for number, etag in receipt.uploads]


def _drop(s3: S3Objects, url: str, upload: str) -> int:
    """End an upload; returns the bytes of its parts."""
    size_bytes = sum(part.size_bytes for part in (s3.list_parts(url, upload) or {}).values())
    s3.abort_upload(url, upload)
    return size_bytes


_UPLOADS = TypeAdapter(dict[str, str])

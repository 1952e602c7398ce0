"""An output in S3: shards as multipart uploads, invisible until they are completed at the commit, the index last.

Beside what every output in object storage has there (`remote`), ``.mergemill/uploads.json`` keeps the id of each
shard's upload.
"""

import json
from collections.abc import Mapping, Sequence

from mergemill.engine.errors import RunError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.run.record import make_record
from mergemill.engine.run.remote import STATE_NAME, RemoteOutput
from mergemill.engine.run.target import Target
from mergemill.engine.run.upload import BESIDE_BYTES, check_limits, make_targets
from mergemill.engine.storage import multipart
from mergemill.engine.storage.multipart import StoredPart


class BucketOutput(RemoteOutput):
    """The objects of an output, and what is done with them: see `Output`."""

    beside_bytes = BESIDE_BYTES

    def __init__(self, url: str) -> None:
        where = url.rstrip("/")
        super().__init__(where, "s3://" + where.split("://", 1)[1], multipart)
        self._uploads_url = self._place(STATE_NAME, "uploads.json")
        self._uploads: dict[str, str] = {}  # of a started plan: the id of each shard's upload, where it is not finished

    def open(self, plan: Plan) -> None:
        """Raise `OutputError` where the prefix holds anything else, or S3 does not take such shards."""
        check_limits(plan)
        super().open(plan)

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

    def commit(self, plan: Plan) -> None:
        """Complete the uploads, write the files, the index last."""
        receipts = {receipt.part: receipt for receipt in self.journal.read()}
        for number, shard in enumerate(plan.shards):
            if not self._is_finished(shard):
                parts = [receipts[part.number] for part in plan.parts if part.shard == number]
                self._complete(shard, parts)
        self._commit_files(plan)

    def abort(self) -> int:
        """End the uploads and remove what an unfinished merge left; returns the bytes freed."""
        found = self._list_for_abort()
        with self.locked():
            freed_bytes = sum(_drop(url, upload) for url, upload in multipart.list_uploads(self._url))
            return freed_bytes + self._remove(found)

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


def _is_listed(receipt: Receipt, listed: Mapping[int, StoredPart] | None) -> bool:
    """Whether the server has all uploads of a part, as they were."""
    if listed is None or not receipt.uploads:
        return False
    return all(int(number) in listed and listed[int(number)].etag == etag for number, etag in receipt.uploads)


def _drop(url: str, upload: str) -> int:
    """End an upload; returns the bytes of its parts."""
    size_bytes = sum(part.size_bytes for part in (multipart.list_parts(url, upload) or {}).values())
    multipart.abort_upload(url, upload)
    return size_bytes

"""Objects of S3: small ones by way of s3fs, and large ones by multipart uploads whose parts come from many workers.

Uploads go past s3fs: it sends all parts from one loop, at 2 to 4 times the CPU (``tests/bench/storage.py``).
"""

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError

from mergemill.engine.errors import MergemillError, StorageError
from mergemill.engine.storage import fetch
from mergemill.engine.storage.body import make_range
from mergemill.engine.storage.bounds import find_state_bound
from mergemill.engine.storage.copied import Copied
from mergemill.engine.storage.objects import check_state
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.s3 import S3Store, split_url
from mergemill.engine.storage.s3_errors import explained
from mergemill.engine.storage.store import ENVIRONMENT, Storage, find_store
from mergemill.engine.storage.tries import insist

T = TypeVar("T")

LEAST_BYTES = 5 << 20  # of a part that is not the last: a limit of S3
MOST_PARTS = 10_000  # of an object
MOST_BYTES = 5 << 40  # of an object
MOST_PUT_BYTES = 5 << 30  # of an object that is written by one request
MISSING_UPLOAD = "NoSuchUpload"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part that the server has."""

    number: int  # from 1
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class S3Objects:
    """Objects of S3, reached as `storage` says: see `Objects`; and their multipart uploads. It travels to workers."""

    storage: Storage = ENVIRONMENT

    def put(
        self, url: str, data: bytes | Copied, *, absent: bool = False, error: type[MergemillError] = StorageError
    ) -> bool:
        """Write a small object; with `absent` only where there is none, and return whether `data` is there now.

        One that is larger is sent from a file, in one request (decided 2026-11-29): S3 takes 5 GiB in one, it can be
        made only where there is none, and no upload is left of one that ends halfway. That request is boto3's, since
        s3fs streams files by uploads alone.
        """
        try:
            if isinstance(data, Copied):
                self._ask(url, lambda client: _put_copied(client, url, data, absent=absent), error)
            else:
                mode = "create" if absent else "overwrite"
                self._ask_files(
                    url, lambda files: files.pipe_file(url, data, mode=mode, chunksize=MOST_PUT_BYTES), error
                )
        except error as found:
            if absent and _code(found) in ("PreconditionFailed", "412"):
                # It may be ours, as after an attempt whose answer was lost.
                return data.is_at(url, self.storage) if isinstance(data, Copied) else self.get(url) == data
            raise
        return True

    def get(self, url: str, *, error: type[MergemillError] = StorageError) -> bytes | None:
        """Return a small object; None where there is none."""
        try:
            most = find_state_bound(url) + 1
            data: bytes = self._ask_files(url, lambda files: files.cat_file(url, start=0, end=most), error)
        except error as found:
            if is_missing(found):
                return None
            if _code(found) in ("InvalidRange", "416"):
                return b""
            raise
        return check_state(data, url)

    def get_all(self, urls: Sequence[str]) -> list[bytes | None]:
        """Return small objects, fetched at the same time."""
        return [coming.result() for coming in [fetch.submit(functools.partial(self.get, url)) for url in urls]]

    def get_age(self, url: str) -> float | None:
        """Return how many seconds ago an object was written, by the clock of the server; None where there is none."""
        bucket, key = split_url(url)
        try:
            found = self._ask_files(url, lambda files: files.call_s3("head_object", Bucket=bucket, Key=key))
        except StorageError as error:
            if is_missing(error):
                return None
            raise
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - found["LastModified"]).total_seconds())

    def delete(self, urls: Sequence[str]) -> None:
        """Remove objects, in their order; what is not there is no error."""
        for url in urls:
            self._ask_files(url, functools.partial(_remove, url=url))

    def list_objects(self, url: str, *, error: type[MergemillError] = StorageError) -> Mapping[str, int]:
        """Return the sizes in bytes of all objects below a prefix, by their names after it."""
        bucket, prefix = _split_prefix(url)
        folder, _, name = f"{bucket}/{prefix}".rstrip("/").rpartition("/")
        # With the last name as a prefix s3fs makes one request; without, one more where nothing is there.
        where = {"path": folder, "prefix": f"{name}/"} if folder else {"path": bucket}
        found = self._ask_files(url, lambda files: files.find(**where, detail=True), error)
        place = f"{bucket}/{prefix}"
        return {each.removeprefix(place): found[each]["size"] for each in sorted(found) if each != place}

    def start_upload(self, url: str) -> str:
        """Begin a multipart upload and return its id."""
        bucket, key = split_url(url)
        return str(self._ask(url, lambda client: client.create_multipart_upload(Bucket=bucket, Key=key))["UploadId"])

    def list_uploads(self, url: str) -> Iterator[tuple[str, str]]:
        """Yield the uploads below a prefix that are not completed: the object's URL, and the id."""
        bucket, prefix = _split_prefix(url)
        found = self._ask(
            url, lambda client: _list(client, "list_multipart_uploads", "Uploads", Bucket=bucket, Prefix=prefix)
        )
        for each in found:
            if each["Key"].startswith(prefix):
                yield f"s3://{bucket}/{each['Key']}", each["UploadId"]

    def list_parts(self, url: str, upload: str) -> Mapping[tuple[int, str], StoredPart] | None:
        """Return the parts of an upload by number and ETag; None where there is no such upload.

        Of a part that was uploaded twice, with other bytes, some servers list both.
        """
        bucket, key = split_url(url)
        try:
            found = self._ask(
                url, lambda client: _list(client, "list_parts", "Parts", Bucket=bucket, Key=key, UploadId=upload)
            )
        except StorageError as error:
            if is_missing(error):
                return None
            raise
        parts = [StoredPart(each["PartNumber"], each["Size"], _unquote(each["ETag"])) for each in found]
        return {(part.number, part.etag): part for part in parts}

    def complete_upload(self, url: str, upload: str, parts: Sequence[tuple[int, str]]) -> bool:
        """Make an object of the parts, (number, ETag) in order; False where there is no such upload (any more)."""
        bucket, key = split_url(url)
        listed = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in parts]}
        where = {"Bucket": bucket, "Key": key, "UploadId": upload}
        try:
            self._ask(url, lambda client: client.complete_multipart_upload(**where, MultipartUpload=listed))
        except StorageError as error:
            if _code(error) == MISSING_UPLOAD:
                return False
            raise
        return True

    def abort_upload(self, url: str, upload: str) -> None:
        """End an upload and drop its parts; one that is gone already is no error."""
        bucket, key = split_url(url)
        try:
            self._ask(url, lambda client: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload))
        except StorageError as error:
            if not is_missing(error):
                raise

    def upload_part(self, url: str, upload: str, number: int, data: memoryview) -> "Future[str]":
        """Begin to upload a part, from memory that the caller leaves alone until its ETag is there."""
        bucket, key = split_url(url)
        where = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number, "ContentLength": len(data)}

        def work() -> str:
            found = self._ask(f"{url}, part {number}", lambda client: client.upload_part(**where, Body=_Body(data)))
            return _unquote(found["ETag"])

        return fetch.submit(work)

    def copy_part(
        self, url: str, upload: str, number: int, source: Pin, offset_bytes: int, size_bytes: int
    ) -> "Future[str]":
        """Begin to have the server copy a range of another object into a part; gives its ETag."""
        bucket, key = split_url(url)
        given_bucket, given_key = split_url(source.url)
        where = {
            "Bucket": bucket,
            "Key": key,
            "UploadId": upload,
            "PartNumber": number,
            "CopySource": {"Bucket": given_bucket, "Key": given_key},
            "CopySourceRange": make_range(offset_bytes, size_bytes),
            "CopySourceIfMatch": source.stamp.removeprefix("etag:"),
        }

        def work() -> str:
            try:
                found = self._ask(f"{url}, part {number}", lambda client: client.upload_part_copy(**where))
            except StorageError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    raise changed(source, "another ETag") from error
                raise
            return _unquote(found["CopyPartResult"]["ETag"])

        return fetch.submit(work)

    def _ask(self, url: str, work: Callable[[Any], T], error: type[MergemillError] = StorageError) -> T:
        """Return what `work` returns of a client; what may pass is tried again, also after boto3 has given it up.

        All of them may be asked twice. A second answer may differ, as that of an upload that was completed at the
        first. Before anything is written (`error` is another one) boto3's patience is enough: most likely the place is
        wrong.
        """

        def ask() -> T:
            with explained(url, error=error, again=error is StorageError):
                return work(self._find_store().client)

        return insist(ask, url)

    def _ask_files(self, url: str, work: Callable[[Any], T], error: type[MergemillError] = StorageError) -> T:
        """Return what `work` returns of a file system, as `_ask` does of a client."""
        return self._ask(url, lambda _: work(self._find_store().files), error)

    def _find_store(self) -> S3Store:
        store = find_store("s3", self.storage)
        assert isinstance(store, S3Store)
        return store


def is_missing(error: MergemillError) -> bool:
    """Whether the server said that an object or an upload is not there."""
    return _code(error) in (MISSING_UPLOAD, "NoSuchKey", "404")


class _Body(io.RawIOBase):
    """Memory as a file to be sent: whole at a time, without a copy."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> Any:
        """Return all that is left, whatever was asked for: what sends it takes blocks of any size."""
        left = self._data[self._at :]
        self._at = len(self._data)
        return left


def _put_copied(client: Any, url: str, data: Copied, *, absent: bool) -> None:
    bucket, key = split_url(url)
    condition = {"IfNoneMatch": "*"} if absent else {}
    with data.open() as body:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=body, ContentLength=data.size_bytes, **condition)
        except BotoCoreError:
            if body.failed is not None:
                raise body.failed from None
            raise


def _remove(files: Any, url: str) -> None:
    files.rm_file(url)


def _list(client: Any, name: str, key: str, **where: str) -> list[Any]:
    return [each for page in client.get_paginator(name).paginate(**where) for each in page.get(key, ())]


def _unquote(etag: str) -> str:
    """Return an ETag as all requests take it: servers give it with quotes in one answer and without in another."""
    return etag.strip('"')


def _split_prefix(url: str) -> tuple[str, str]:
    bucket, key = split_url(url)
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _code(error: MergemillError) -> str:
    """Return the server's word for what went wrong."""
    response = getattr(error.__cause__, "response", None) or {}  # None is of those that never had an answer
    return str(response.get("Error", {}).get("Code", ""))

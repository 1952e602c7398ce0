"""Writing objects of S3: whole small ones, and large ones by multipart uploads whose parts come from many workers."""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage import fetch
from mergemill.engine.storage.s3 import S3Store, explained, split_url
from mergemill.engine.storage.store import find_store

LEAST_BYTES = 5 << 20  # of a part that is not the last: a limit of S3
MOST_PARTS = 10_000  # of an object
MOST_BYTES = 5 << 40  # of an object
MISSING_UPLOAD = "NoSuchUpload"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part that the server has."""

    number: int  # from 1
    size_bytes: int
    etag: str


def put(url: str, data: bytes, *, absent: bool = False) -> bool:
    """Write a small object; with `absent` only where there is none, and return whether it was written."""
    condition = {"IfNoneMatch": "*"} if absent else {}
    bucket, key = split_url(url)
    try:
        with explained(url, error=StorageError):
            _client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
    except StorageError as error:
        if absent and _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
            return False
        raise
    return True


def get(url: str) -> bytes | None:
    """Return a small object; None where there is none."""
    bucket, key = split_url(url)
    try:
        with explained(url, error=StorageError):
            data: bytes = _client().get_object(Bucket=bucket, Key=key)["Body"].read()
    except StorageError as error:
        if _code(error) in ("NoSuchKey", "404"):
            return None
        raise
    return data


def get_all(urls: Sequence[str]) -> list[bytes | None]:
    """Return small objects, fetched at the same time."""
    return [coming.result() for coming in [fetch.submit(functools.partial(get, url)) for url in urls]]


def get_age(url: str) -> float | None:
    """Return how many seconds ago an object was written, by the clock of the server; None where there is none."""
    bucket, key = split_url(url)
    try:
        with explained(url, error=StorageError):
            found = _client().head_object(Bucket=bucket, Key=key)
    except StorageError as error:
        if _code(error) in ("NoSuchKey", "404"):
            return None
        raise
    now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - found["LastModified"]).total_seconds())


def delete(urls: Sequence[str]) -> None:
    """Remove objects, in their order; what is not there is no error."""
    for url in urls:
        bucket, key = split_url(url)
        with explained(url, error=StorageError):
            _client().delete_object(Bucket=bucket, Key=key)


def list_objects(url: str) -> Mapping[str, int]:
    """Return the sizes in bytes of all objects below a prefix, by their names after it."""
    bucket, prefix = _split_prefix(url)
    with explained(url, error=OutputError):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", ())}
    return {key.removeprefix(prefix): size for key, size in found.items() if key != prefix}


def start_upload(url: str) -> str:
    """Begin a multipart upload and return its id."""
    bucket, key = split_url(url)
    with explained(url, error=StorageError):
        return str(_client().create_multipart_upload(Bucket=bucket, Key=key)["UploadId"])


def list_uploads(url: str) -> Iterator[tuple[str, str]]:
    """Yield the uploads below a prefix that are not completed: the object's URL, and the id."""
    bucket, prefix = _split_prefix(url)
    with explained(url, error=StorageError):
        pages = _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        found = [each for page in pages for each in page.get("Uploads", ())]
    for each in found:
        if each["Key"].startswith(prefix):
            yield f"s3://{bucket}/{each['Key']}", each["UploadId"]


def list_parts(url: str, upload: str) -> Mapping[int, StoredPart] | None:
    """Return the parts of an upload by number; None where there is no such upload."""
    bucket, key = split_url(url)
    try:
        with explained(url, error=StorageError):
            pages = _client().get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload)
            found = [each for page in pages for each in page.get("Parts", ())]
    except StorageError as error:
        if _code(error) in (MISSING_UPLOAD, "NoSuchKey", "404"):
            return None
        raise
    return {each["PartNumber"]: StoredPart(each["PartNumber"], each["Size"], each["ETag"]) for each in found}


def complete_upload(url: str, upload: str, parts: Sequence[tuple[int, str]]) -> bool:
    """Make an object of the parts, (number, ETag) in order; False where there is no such upload (any more)."""
    bucket, key = split_url(url)
    listed = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
    try:
        with explained(url, error=StorageError):
            _client().complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
            )
    except StorageError as error:
        if _code(error) == MISSING_UPLOAD:
            return False
        raise
    return True


def abort_upload(url: str, upload: str) -> None:
    """End an upload and drop its parts; one that is gone already is no error."""
    bucket, key = split_url(url)
    try:
        with explained(url, error=StorageError):
            _client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
    except StorageError as error:
        if _code(error) not in (MISSING_UPLOAD, "404"):
            raise


def upload_part(url: str, upload: str, number: int, data: memoryview) -> "Future[str]":
    """Begin to upload a part, from memory that the caller leaves alone until its ETag is there."""

    def work() -> str:
        bucket, key = split_url(url)
        with explained(f"{url}, part {number}", error=StorageError):
            found = _client().upload_part(
                Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=_Body(data), ContentLength=len(data)
            )
        return str(found["ETag"])

    return fetch.submit(work)


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


def _client() -> Any:
    store = find_store("s3")
    assert isinstance(store, S3Store)
    return store.client


def _split_prefix(url: str) -> tuple[str, str]:
    bucket, key = split_url(url)
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _code(error: StorageError) -> str:
    """Return the server's word for what went wrong."""
    response = getattr(error.__cause__, "response", {})
    return str(response.get("Error", {}).get("Code", ""))

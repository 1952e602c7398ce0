"""What the tests of merges from and to S3 share: prefixes of a test's own, models put there, what lies there.

Workers and drivers of processes of their own can import this module.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers.fixtures import BUCKET
from servers.s3 import S3

from mergemill.engine.storage.ranges import close_all

STATE = ".mergemill/"
INDEX = "model.safetensors.index.json"
_NUMBERS = itertools.count()


class Place:
    """A prefix of a bucket."""

    def __init__(self, server: S3, prefix: str) -> None:
        self.prefix = prefix
        self._client = connect(server)

    @property
    def url(self) -> str:
        """As a user writes it."""
        return f"s3://{BUCKET}/{self.prefix}"

    def read(self) -> dict[str, bytes]:
        """Return the content of all objects, by name."""
        return {name: self._client.get_object(**self._name(name))["Body"].read() for name in self.sizes()}

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all objects, by name."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        found = [each for page in pages for each in page.get("Contents", ())]
        return {each["Key"].removeprefix(f"{self.prefix}/"): each["Size"] for each in found}

    def hash(self) -> dict[str, str]:
        """Return the sha256 of every object but mergemill's own, by name."""
        return {n: hashlib.sha256(data).hexdigest() for n, data in self.read().items() if not n.startswith(STATE)}

    def put(self, name: str, data: bytes) -> None:
        """Write an object."""
        self._client.put_object(**self._name(name), Body=data)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._client.delete_object(**self._name(name))

    def uploads(self) -> dict[str, str]:
        """Return the uploads that are not completed: object name by id."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        found = [each for page in pages for each in page.get("Uploads", ())]
        return {each["UploadId"]: each["Key"].removeprefix(f"{self.prefix}/") for each in found}

    def start_upload(self, name: str) -> str:
        """Begin an upload that no merge knows, with a part."""
        upload = str(self._client.create_multipart_upload(**self._name(name))["UploadId"])
        self._client.upload_part(**self._name(name), UploadId=upload, PartNumber=1, Body=b"somebody's")
        return upload

    def end_upload(self, upload: str) -> None:
        """Drop an upload and its parts, as a rule of the bucket may."""
        self._client.abort_multipart_upload(**self._name(self.uploads()[upload]), UploadId=upload)

    def replace_part(self, upload: str, number: int, data: bytes) -> None:
        """Upload something else as a part."""
        where = self._name(self.uploads()[upload])
        self._client.upload_part(**where, UploadId=upload, PartNumber=number, Body=data)

    def parts(self, upload: str) -> list[int]:
        """Return the sizes of an upload's parts."""
        pages = self._client.get_paginator("list_parts").paginate(**self._name(self.uploads()[upload]), UploadId=upload)
        return [part["Size"] for page in pages for part in page.get("Parts", ())]

    def is_loadable(self) -> bool:
        """Whether a loader finds something that it takes for a whole model."""
        return bool({INDEX, "model.safetensors"} & self.sizes().keys())

    def fill(self, folder: Path) -> "Place":
        """Put all files of a folder here."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(str(path.relative_to(folder)), path.read_bytes())
        return self

    def _name(self, name: str) -> dict[str, str]:
        return {"Bucket": BUCKET, "Key": f"{self.prefix}/{name}"}


@functools.cache
def connect(server: S3) -> Any:
    """Return a client of the server itself, whatever stands between it and the merge."""
    return server.connect()


def new_place(server: S3, *, name: str = "out") -> Place:
    """Return a prefix that nobody has used."""
    return Place(server, f"{name}-{next(_NUMBERS):04d}")


@functools.cache
def put_family(server: S3, family: Path) -> Place:
    """Return where the models of a folder lie on a server; they are put there once."""
    return new_place(server, name="family").fill(family)


@contextmanager
def found_by_environment(server: S3, **more: str) -> Iterator[None]:
    """Let merges of this process, and of those that it starts meanwhile, find the server; they keep no connection."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in (server.make_environ() | more).items():
            patch.setenv(name, value)
        close_all()
        yield
    close_all()


def without_state(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not mergemill's own."""
    return {name: value for name, value in objects.items() if not name.startswith(STATE)}

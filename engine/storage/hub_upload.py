"""Writing a model to the Hub: large files one by one to its storage, then one commit that names them all.

Large files go by LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), as huggingface_hub speaks it. It
would rather use Xet, which takes memory as it likes, and does not say what it has of files that no commit names yet.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.lfs import UploadInfo, lfs_upload, post_lfs_batch_info
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from mergemill.engine.errors import MergemillError, OutputError, StorageError
from mergemill.engine.storage.hub_refusals import explained
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.tries import insist

T = TypeVar("T")

_BATCH = 256  # files that the Hub is asked about at once
_ANSWER_S = 30.0  # how long the Hub may be silent about a repository


@dataclass(frozen=True, slots=True)
class Content:
    """A large file of a repository."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Head:
    """The main branch of a repository as it is now."""

    commit: str
    private: bool
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model's repository, to be written to with the token that huggingface_hub finds on this machine."""

    name: str  # org/name
    endpoint: str  # of the Hub

    def look(self) -> Head | None:
        """Return what it holds; None where there is no such repository, or none that the token may see."""

        def ask() -> Head | None:
            try:
                found = _open_api(self.endpoint).model_info(self.name, timeout=_ANSWER_S)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise  # the token is none
                return None
            files = frozenset(each.rfilename for each in found.siblings or ())
            return Head(str(found.sha), bool(found.private), files)

        return self._patiently(ask, "looking at it", OutputError)

    def create(self, *, private: bool) -> Head:
        """Make it, and return what the Hub puts into it."""
        api = _open_api(self.endpoint)
        self._patiently(
            lambda: api.create_repo(self.name, private=private, exist_ok=True), "making the repository", OutputError
        )
        head = self.look()
        if head is None:
            raise OutputError(f"{self}: was made, and cannot be seen with the token used here")
        return head

    def find_missing(self, contents: Sequence[Content]) -> list[Content]:
        """Return those that the storage of the Hub does not have."""
        missing: list[Content] = []
        for start in range(0, len(contents), _BATCH):
            some = contents[start : start + _BATCH]
            asked = functools.partial(self._plan_uploads, some)
            wanted = {action["oid"] for action in self._patiently(asked, "asking for uploads") if action.get("actions")}
            missing += [content for content in some if content.sha256 in wanted]
        return missing

    def upload(self, content: Content, open_raw: Callable[[], io.RawIOBase], check_going: Callable[[], None]) -> None:
        """Bring a file into the storage of the Hub, unless it has one like it.

        open_raw: opens what is sent, again for each attempt. `check_going` may raise to end that.
        """

        def send() -> None:
            for action in self._plan_uploads([content]):  # with another signature at each attempt
                self._send(content, open_raw, action, check_going)

        self._patiently(send, f"uploading {content.name}")

    def commit(self, contents: Sequence[Content], files: Mapping[str, bytes], head: Head, title: str) -> None:
        """Add files to the main branch in one commit: `contents` that are uploaded, and small ones with their bytes.

        Raises `Unavailable` where it may have been done, and `StorageError` where the branch is not at `head` any more.
        """
        operations = [_make_addition(content) for content in contents]
        operations += [CommitOperationAdd(name, data) for name, data in files.items()]
        with explained(str(self), self.endpoint, StorageError), _without_bars():
            _open_api(self.endpoint).create_commit(
                self.name, operations, commit_message=title, parent_commit=head.commit
            )

    def __str__(self) -> str:
        """Return its URL."""
        return f"hf://{self.name}"

    def _plan_uploads(self, contents: Sequence[Content]) -> list[dict[str, Any]]:
        """Ask where contents go; what the Hub has says nothing of ``actions``."""
        infos = [_make_info(content) for content in contents]
        found = post_lfs_batch_info(infos, None, "model", self.name, endpoint=self.endpoint, headers=_make_headers())
        actions, errors = found[:2]
        if errors:
            raise StorageError(f"{self}: the Hub does not take {errors[0]['oid']}: {errors[0]['error']['message']}")
        return actions

    def _send(
        self,
        content: Content,
        open_raw: Callable[[], io.RawIOBase],
        action: dict[str, Any],
        check_going: Callable[[], None],
    ) -> None:
        addition = _make_addition(content)
        with open_raw() as raw, _Watched(raw, check_going) as file:
            addition.path_or_fileobj = file
            try:
                lfs_upload(addition, action, headers=_make_headers(), endpoint=self.endpoint)
            except HfHubHTTPError as error:
                if str(error.response.url).startswith(self.endpoint):
                    raise
                # Addresses of the storage are signed, and run out.
                raise Unavailable(f"its storage answers {error.response.status_code}") from None

    def _patiently(self, ask: Callable[[], T], doing: str, error: type[MergemillError] = StorageError) -> T:
        def ask_once() -> T:
            with explained(str(self), self.endpoint, error):
                return ask()

        return insist(ask_once, f"{self}: {doing}")


class _Watched(io.BufferedReader):
    """A file that is sent for as long as somebody wants it."""

    def __init__(self, raw: io.RawIOBase, check_going: Callable[[], None]) -> None:
        super().__init__(raw)
        self._check_going = check_going

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, unless that is to end."""
        self._check_going()
        return super().read(size)


def find_endpoint() -> str:
    """Return the URL of the Hub, as the environment says."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@functools.cache
def _open_api(endpoint: str) -> HfApi:
    # With `True` a token that is missing is told of here, and not as a repository that nobody may see.
    return HfApi(endpoint=endpoint, token=True, library_name="mergemill", library_version=version("mergemill"))


def _make_headers() -> dict[str, str]:
    return build_hf_headers(token=True, library_name="mergemill", library_version=version("mergemill"))


def _make_info(content: Content) -> UploadInfo:
    # The sample is only asked for where the Hub is to decide how a file is stored.
    return UploadInfo(size=content.size_bytes, sample=b"", sha256=bytes.fromhex(content.sha256))


def _make_addition(content: Content) -> CommitOperationAdd:
    """Return a file of a commit that is in the storage of the Hub already; its bytes may be nowhere else.

    huggingface_hub makes such only of files that are there, or were when it uploaded them: its `preupload_lfs_files`
    wants all bytes of a file in the process that commits, and a merge that is resumed has removed them. So the two
    private fields are set that it sets itself (2026-11-29); a version that knows them no more is an error here and
    not a commit of nothing, and pyproject.toml bounds the version.
    """
    addition = CommitOperationAdd(content.name, b"")
    addition.upload_info = _make_info(content)
    for name, value in (("_upload_mode", "lfs"), ("_is_uploaded", True)):
        if not hasattr(addition, name):
            raise StorageError(
                f"huggingface_hub {version('huggingface_hub')}: has no CommitOperationAdd.{name}, which a commit "
                "of files that are uploaded already needs; install the one that mergemill's constraints name"
            )
        setattr(addition, name, value)
    return addition


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing progress."""
    drawn = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            enable_progress_bars()

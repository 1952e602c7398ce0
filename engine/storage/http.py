"""Files of web servers by URL, read by range.

A web server lists nothing, so a folder is what answers below its URL to the usual names of a model's files; shards
are asked for by the names that the index gives them.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import fsspec
from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import Absent, CheckpointError, StorageError
from mergemill.engine.storage.connections import Connections
from mergemill.engine.storage.fetch import sample_remote
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable, check_options
from mergemill.engine.storage.tries import BEFORE, ask_patiently
from mergemill.engine.storage.urls import WEIGHT_ENDINGS

NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "normalizer.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder is asked for; a file with another name is not found."""

BENEATH = ("config.json", "model.safetensors")
"""What a folder in it is asked for: one of its modules, as sentence-transformers has them."""

PROBES = 8  # of them at a time

MOST_DIGITS = 18  # of a file's size in bytes: no file has more
_FORBIDDEN = (401, 403)
_GONE = (404, 410)
_NO_HEAD = (400, 401, 403, 405, 501)  # as answers to HEAD: a signed redirect may be for GET alone
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def open_store(scheme: str, options: Mapping[str, Any]) -> "HttpStore":
    """Return the store of this process."""
    check_options(scheme, options, ())
    return HttpStore()


class HttpStore:
    """Files of web servers."""

    checks_reads = True

    def __init__(self) -> None:
        self._connections = Connections()

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL without a slash at its end; nothing is asked yet."""
        _check_url(url)
        if revision is not None:
            raise CheckpointError(f"{url}@{revision}: web servers have no revisions; only models on the Hub have")
        return url.rstrip("/")

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return those of the usual names that a folder has; None where `url` is a file, as its ending says."""
        if url.endswith(WEIGHT_ENDINGS):
            return None
        names = (*NAMES, *(f"{beneath}/{name}" for name in BENEATH if beneath))
        urls = {name: f"{url}/{name}" for name in names}
        with ThreadPoolExecutor(PROBES) as pool:
            found = dict(zip(urls, pool.map(self._find_pin, urls.values()), strict=True))
        pins = {name: pin for name, pin in found.items() if isinstance(pin, Pin)}
        if not pins:
            denied = "; access denied to some" if any(status in _FORBIDDEN for status in found.values()) else ""
            raise CheckpointError(f"{url}: has none of the files of a model, config.json and the like{denied}")
        return pins

    def pin_file(self, url: str) -> Pin:
        """Return the pin of a file."""
        found = self._find_pin(url)
        if isinstance(found, Pin):
            return found
        if found in _FORBIDDEN:
            raise CheckpointError(f"{url}: access denied ({found})")
        raise Absent(f"{url}: no such file ({found})")

    def find_system(self, url: str) -> Any:
        """Return fsspec's own, which needs aiohttp; it is shared within the process, and has no options."""
        return fsspec.filesystem(urlsplit(url).scheme)

    def is_here(self, pin: Pin) -> bool:
        """Nothing is."""
        return False

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the file that was pinned, and of no other."""
        return self._connections.read_range(
            pin, pin.url, _make_conditions(pin.stamp), offset_bytes, buffer, lambda answer: _check(pin, answer)
        )

    def _find_pin(self, url: str) -> Pin | int:
        """Return a file's pin, or the status with which the server says that there is none."""
        try:
            return ask_patiently(lambda: self._ask_pin(url), BEFORE)
        except Unavailable as error:
            raise CheckpointError(f"{url}: cannot be reached: {error}") from error

    def _ask_pin(self, url: str) -> Pin | int:
        answer = self._connections.ask("HEAD", url, {})
        answer.drain_conn()  # of nothing; it gives the connection back
        if answer.status in _NO_HEAD or (answer.status == 200 and "content-length" not in answer.headers):
            answer = self._connections.ask("GET", url, {"Range": "bytes=0-0"})
            answer.close()  # a server without ranges sends all of it
        if answer.status in (*_FORBIDDEN, *_GONE):
            return answer.status
        whole = answer.headers.get("content-length", "")
        size = whole if answer.status == 200 else answer.headers.get("content-range", "").rpartition("/")[2]
        if answer.status not in (200, 206, 416) or not size.isdecimal() or len(size) > MOST_DIGITS:
            raise CheckpointError(f"{url}: its server answers {answer.status} and not how long it is")
        return Pin(url, int(size), _stamp(answer.headers) or sample_remote(self, url, int(size)))


def _check_url(url: str) -> None:
    """Raise unless a URL names a file or folder of a web server."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{url.partition(':')[0]}://…: is no URL: {error}") from error
    place = f"{parts.scheme}://{parts.netloc}{parts.path}"
    if not parts.hostname or any(mark in url for mark in " \t\r\n"):
        raise CheckpointError(f"{place}: is no URL; it has no host, or spaces")
    if "#" in url:
        raise CheckpointError(f"{place}: its URL goes on after the path; leave out what follows #")
    if parts.hostname in _HUB_HOSTS and "/resolve/" not in parts.path:
        raise CheckpointError(f"{place}: is a page of the Hub; a model there is written hf://org/name")


def _stamp(headers: Mapping[str, str]) -> str:
    for name in ("etag", "last-modified"):
        if found := headers.get(name):
            return f"{name}:{found}"
    return ""


def _make_conditions(stamp: str) -> dict[str, str]:
    """Return the headers that ask for this version of a file or none.

    >>> _make_conditions('etag:"a"'), _make_conditions('etag:W/"a"')
    ({'If-Match': '"a"'}, {})
    """
    kind, _, value = stamp.partition(":")
    if kind == "etag":
        return {} if value.startswith("W/") else {"If-Match": value}  # a weak one never matches there
    return {"If-Unmodified-Since": value} if kind == "last-modified" else {}


def _check(pin: Pin, answer: BaseHTTPResponse) -> None:
    """Raise unless an answer is of the file that was pinned."""
    if answer.status in _GONE:
        raise changed(pin, "gone")
    if answer.status == 416:
        raise changed(pin, f"{answer.headers.get('content-range', '').rpartition('/')[2] or 'fewer'} bytes")
    if answer.status in _FORBIDDEN:
        raise StorageError(f"{pin.url}: access denied ({answer.status})")
    kind = "" if pin.stamp.startswith("sample:") else pin.stamp.partition(":")[0]
    now = f"{kind}:{answer.headers.get(kind, 'none')}" if kind else ""
    if answer.status == 412 or (kind and answer.status in (200, 206) and _weaken(now) != _weaken(pin.stamp)):
        raise changed(pin, now)


def _weaken(stamp: str) -> str:
    return stamp.replace("etag:W/", "etag:", 1)

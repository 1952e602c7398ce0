"""Connections to web servers, kept and shared by the threads of a process; what their answers mean for a reader."""

import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import StorageError
from mergemill.engine.storage.body import check_range, make_range, read_body
from mergemill.engine.storage.fetch import CONNECTIONS
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.urls import hide_secrets

CONNECT_S, READ_S = 10, 60  # how long a connection may take, and how long one may be silent
LONGEST_WAIT_S = 30.0  # that a server may ask for
REDIRECTS = 5  # that are followed
_POOLS = 32  # hosts whose connections are kept
_PLAIN = {"Accept-Encoding": "identity"}  # or the bytes would be others than the file's

# Only redirects are done again here: who asks counts the attempts.
_RETRIES = urllib3.Retry(
    total=None, connect=0, read=0, redirect=REDIRECTS, status=0, other=0, respect_retry_after_header=False
)


class Connections:
    """A pool of connections for each server, and each proxy on the way to it."""

    def __init__(self, ca_certs: str | None = None) -> None:
        self._ca_certs = ca_certs  # a file; by default the system's
        self._managers: dict[str | None, urllib3.PoolManager] = {}

    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Return the answer to a request, after redirects, its body not yet read.

        An Authorization header goes to the host of `url` alone. Raises `Unavailable` for what may pass, after the wait
        that the server asks for.
        """
        try:
            answer = self._find_manager(find_proxy(url)).urlopen(
                method,
                url,
                headers={**_PLAIN, **headers},
                preload_content=False,
                retries=_RETRIES,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S),
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(shorten(getattr(error, "reason", None) or error)) from None  # its text has the query
        if is_transient(answer.status):
            answer.close()
            wait_as_told(answer.headers)
            raise Unavailable(f"the server answers {answer.status}")
        return answer

    def read_range(
        self,
        pin: Pin,
        url: str,
        headers: Mapping[str, str],
        offset_bytes: int,
        buffer: memoryview,
        check: Callable[[BaseHTTPResponse], None],
    ) -> int:
        """Fill the beginning of `buffer` by one request to `url`, and return how much of it.

        check: raises for an answer that is not of the pinned file.
        """
        answer = self.ask("GET", url, {**headers, "Range": make_range(offset_bytes, len(buffer))})
        try:
            check(answer)
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise StorageError(f"{pin.url}: its server sends it compressed, unasked; copy the file first")
            check_range(pin, offset_bytes, len(buffer), answer.status, answer.headers)
            return read_body(answer, buffer)
        except BaseException:
            answer.close()
            raise

    def _find_manager(self, proxy: str | None) -> urllib3.PoolManager:
        if proxy not in self._managers:
            self._managers.setdefault(proxy, _open_manager(proxy, self._ca_certs))
        return self._managers[proxy]


def _open_manager(proxy: str | None, ca_certs: str | None) -> urllib3.PoolManager:
    # Not with `block`: there a connection that is closed, not given back, is missing for ever, until all wait.
    size: Mapping[str, Any] = {"num_pools": _POOLS, "maxsize": CONNECTIONS, "ca_certs": ca_certs}
    if proxy is None:
        return urllib3.PoolManager(**size)
    user, at, _ = urlsplit(proxy).netloc.rpartition("@")
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if at else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **size)


def find_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL (``https_proxy``, ``no_proxy``, …), if any."""
    proxies = urllib.request.getproxies()
    parts = urlsplit(url)
    found = proxies.get(parts.scheme) or proxies.get("all")
    return found if found and not urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]) else None


def is_transient(status: int) -> bool:
    """Whether an answer may be another one soon.

    >>> [is_transient(status) for status in (206, 404, 429, 503)]
    [False, False, True, True]
    """
    return status in (408, 425, 429) or status >= 500


def wait_as_told(headers: Mapping[str, str]) -> None:
    """Wait for as long as an answer asks for, within reason."""
    try:
        told_s = _RETRIES.parse_retry_after(headers.get("Retry-After", "0"))
    except urllib3.exceptions.InvalidHeader:
        return
    time.sleep(min(told_s, LONGEST_WAIT_S))


def shorten(error: Exception) -> str:
    """Return kind and first line of an error, without the secrets of URLs in it.

    >>> shorten(ValueError("no //me:hush@host/a?Signature=x"))
    'ValueError: no //host/a'
    """
    text = hide_secrets((str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {text}".rstrip(": ")

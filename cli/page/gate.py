"""Who may ask the page for anything: by Host, Origin and token, before a request is looked at further.

The token is in the fragment of the address, which browsers send nowhere, and then in a header that no other site can
add: not in a cookie, which would go to every port of the machine, so to other users' servers, and along with requests
that another site makes. So there is nothing to forge (CSRF), and Origin is asked all the same. A name of an attacker's
that is made to lead here (DNS rebinding) fails at Host. What holds no secret, the page's own files, needs no token.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from mergemill.engine import errors

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BODY_BYTES = 2 << 20
LEAST_TOKEN = 16  # characters of a token of one's own
OPEN_PATHS = ("/", "/static/", "/shown/")  # what is shown has a ticket, for once, in its address


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is, for the browsers that may use it."""

    host: str  # that it listens at
    port: int
    url: str = ""  # by which browsers reach it, where a proxy is between
    framed_by: str = ""  # the site that may show it in a frame

    def list_hosts(self) -> frozenset[str]:
        """Return the values of Host that mean this page."""
        names = {self.host, *(LOOPBACK if is_loopback(self.host) else ())}
        return frozenset({*(_join(name, self.port) for name in names), *filter(None, [urlsplit(self.url).netloc])})

    def list_origins(self) -> frozenset[str]:
        """Return the origins of the page's own scripts."""
        own = {f"http://{host}" for host in self.list_hosts()}
        return frozenset(own | ({self.url.rstrip("/")} if self.url else set()))


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    return host in LOOPBACK


def check_site(option: str, url: str) -> None:
    """Raise `InputError` for what is no scheme and host: it goes into a header."""
    if url and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+/?", url):
        raise errors.InputError(f"{option} {url}: write scheme and host alone, such as https://merge.example.org")


def find_refusal(
    address: Address, token: str, *, method: str, path: str, headers: Mapping[str, str]
) -> tuple[int, str] | None:
    """Return status and reason where a request is refused; headers by their names in lower case.

    >>> find_refusal(Address("127.0.0.1", 80), "t", method="GET", path="/", headers={"host": "evil.example"})
    (421, 'this page is not at evil.example')
    """
    host = headers.get("host", "")
    if host not in address.list_hosts():
        return 421, f"this page is not at {host or 'an address without a name'}"
    if _is_open(path):
        return None if method in ("GET", "HEAD") else (405, "this is only read")
    origin = headers.get("origin")
    if origin is not None and origin not in address.list_origins():
        return 403, f"{origin} is another site"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return 403, "another site asks"
    given = headers.get("authorization", "").removeprefix("Bearer ")
    if not secrets.compare_digest(given.encode(), token.encode()):
        return 401, "the token is missing or wrong; open the address that mergemill ui has printed"
    if method == "POST" and headers.get("content-type", "").partition(";")[0] != "application/json":
        return 415, "this page takes JSON only"
    return None


def make_headers(address: Address, path: str) -> dict[str, str]:
    """Return the headers of every answer: nothing but the page's own files is loaded, from nowhere else."""
    frames = address.framed_by or "'none'"
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        f"form-action 'none'; base-uri 'none'; frame-ancestors {frames}"
    )
    if path.startswith("/shown/"):  # a report: pictures and tables, no script whatever a model's names may hold
        policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }


def _is_open(path: str) -> bool:
    return path == OPEN_PATHS[0] or path.startswith(OPEN_PATHS[1:])


def _join(name: str, port: int) -> str:
    bracketed = f"[{name}]" if ":" in name else name
    return bracketed if port == 80 else f"{bracketed}:{port}"

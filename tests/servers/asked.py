"""What a client asked of a server, as rules choose faults by it and tests count it."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from servers.hub_routes import find_route

RANGE = re.compile(r"bytes=(\d*)-(\d*)")

BY_PARAMETER = {
    ("POST", "uploads"): "create",
    ("POST", "uploadId"): "complete",
    ("POST", "delete"): "delete_many",
    ("PUT", "partNumber"): "part",
    ("GET", "uploads"): "list_uploads",
    ("GET", "uploadId"): "list_parts",
    ("GET", "list-type"): "list",
    ("DELETE", "uploadId"): "abort",
}
"""The operations of S3 that are told apart by a parameter; the others are their method."""


SIGNED = re.compile("Signature|Expires|X-Amz-.*")
"""Parameters of a signed address, which are new with every signature."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a client."""

    number: int
    """Its place among all requests, from 0, in the order of their arrival."""
    attempt: int
    """How many requests for the same came before it: same method, target and range, whatever the signature."""
    kind: str
    """The operation. Of S3: get, head, put, copy, part, copy_part, create, complete, abort, delete, list, list_parts,
    list_uploads, delete_many; of the Hub: the names in `hub_routes`."""
    method: str
    path: str
    """The path, with percent signs decoded and without parameters."""
    parameters: Mapping[str, str] = field(compare=False)
    range: tuple[int, int | None] | None
    """Start and stop in bytes; a stop of None is the end, a negative start counts from there. None asks for all."""
    headers: Mapping[str, str] = field(compare=False, repr=False)
    """The headers, by names in small letters."""


def make_request(number: int, attempt: int, method: str, target: str, headers: Mapping[str, str]) -> Request:
    """Return what `method target`, with these headers by names in small letters, asks for."""
    parts = urlsplit(target)
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    kind = find_kind(method, parts.path, parameters, copies="x-amz-copy-source" in headers)
    span = parse_range(headers.get("range", ""))
    return Request(number, attempt, kind, method, unquote(parts.path), parameters, span, headers)


def name_same(method: str, target: str, headers: Mapping[str, str]) -> str:
    """Return what repeated attempts at one thing have in common."""
    parts = urlsplit(target)
    kept = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not SIGNED.fullmatch(pair[0])]
    return repr((method, parts.path, sorted(kept), headers.get("range")))


def find_kind(method: str, path: str, parameters: Collection[str], *, copies: bool) -> str:
    """Return the name of an operation of the Hub or of S3; `path` is as it was sent."""
    if route := find_route(method, path):
        return route[0]
    named = (BY_PARAMETER.get((method, name)) for name in parameters)
    kind = next(filter(None, named), "")
    if copies:
        return f"copy_{kind}".rstrip("_")
    return kind or method.lower()


def parse_range(text: str) -> tuple[int, int | None] | None:
    """Return start and stop of a Range header of one range, None of any other text."""
    match = RANGE.fullmatch(text)
    if not match or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return -int(last), None
    return int(first), int(last) + 1 if last else None

"""What can go wrong with one request, and rules that say with which.

A rule is a pure function of a request, so that a test fails the same way twice.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from servers.asked import Request


@dataclass(frozen=True, slots=True)
class Fault:
    """What the proxy does to one request and its answer: by itself, nothing. The functions below make the usual."""

    name: str
    """The kind of fault, to be counted by."""
    status: int | None = None
    """The proxy answers with this status itself, and the server is not asked."""
    code: str = ""
    """The code of S3 in the body of that answer."""
    delay_s: float = 0.0
    """The first byte of the answer is this late."""
    rate: float = math.inf
    """Bytes a second of the bodies, both ways."""
    cut_after_bytes: int | None = None
    """The connection ends after this much of the answer's body."""
    cut_upload_after_bytes: int | None = None
    """Both connections end after this much of the request's body."""
    silent: bool = False
    """The server does what it was asked, and the connection ends in place of an answer."""
    reset: bool = False
    """Where the connection ends, it does so with RST rather than FIN."""
    longer_bytes: int = 0
    """The answer's body is this much longer than the server's, filled with zeros, or shorter; its length says so."""
    other_etag: bool = False
    """The answer has another ETag: the same one each time for one of the server's."""
    other_bytes: bool = False
    """Every byte of the answer's body is another one."""
    whole: bool = False
    """The server is not told of the range. (Where that is signed, it refuses.)"""


Rule = Callable[[Request], Fault | None]


def refuse(status: int = 503, code: str = "SlowDown") -> Fault:
    """Answer with an error of the server's own making: 503 SlowDown, 500 InternalError."""
    return Fault(f"refuse {status}", status=status, code=code)


def expire() -> Fault:
    """Answer as for a signed address that has run out."""
    return Fault("expire", status=403, code="AccessDenied")


def start_slowly(delay_s: float) -> Fault:
    """Let the client wait for the first byte."""
    return Fault("start slowly", delay_s=delay_s)


def throttle(rate: float) -> Fault:
    """Let no more than `rate` bytes a second pass."""
    return Fault("throttle", rate=rate)


def reset_after(size_bytes: int) -> Fault:
    """Reset the connection in the middle of the body."""
    return Fault("reset", cut_after_bytes=size_bytes, reset=True)


def truncate_after(size_bytes: int) -> Fault:
    """Close the connection in the middle of the body, as if that were its end; the length promised more."""
    return Fault("truncate", cut_after_bytes=size_bytes)


def reset_upload_after(size_bytes: int) -> Fault:
    """Reset the connection in the middle of what the client sends."""
    return Fault("reset upload", cut_upload_after_bytes=size_bytes, reset=True)


def lose_answer() -> Fault:
    """Have it done, and reset the connection before the client hears of it."""
    return Fault("lose answer", silent=True, reset=True)


def change_length(by_bytes: int) -> Fault:
    """Send fewer bytes than were asked for, or more, under a length that fits them."""
    return Fault("change length", longer_bytes=by_bytes)


def change_etag() -> Fault:
    """Send the right bytes as those of another version."""
    return Fault("change etag", other_etag=True)


def change_bytes() -> Fault:
    """Send other bytes, as those of another version."""
    return Fault("change bytes", other_etag=True, other_bytes=True)


def ignore_range() -> Fault:
    """Send the whole file for a range of it, with status 200; not where the range is signed."""
    return Fault("ignore range", whole=True)


def never(request: Request) -> Fault | None:
    """Let everything pass."""
    return None


def at_numbers(faults: Mapping[int, Fault]) -> Rule:
    """Return a rule by `Request.number`: a script."""
    return lambda request: faults.get(request.number)


def at_first(attempts: int, fault: Fault, *kinds: str) -> Rule:
    """Return a rule that fails the first attempts at each thing; of all kinds, if none is named."""
    return lambda request: fault if request.attempt < attempts and (not kinds or request.kind in kinds) else None


def at_random(seed: int, share: float, faults: Sequence[Fault], kinds: Collection[str] = ()) -> Rule:
    """Return a rule that fails a share of the requests, each with one of the faults.

    It goes by what is asked and how often it was before, not by the order of arrival, nor by names that the server
    chooses: threads and processes meet the same faults.
    """

    def choose(request: Request) -> Fault | None:
        part = request.parameters.get("partNumber", "")
        asked = (seed, request.method, request.kind, request.path, part, request.range, request.attempt)
        draw = random.Random(repr(asked))
        fails = draw.random() < share and (not kinds or request.kind in kinds)
        return draw.choice(faults) if fails else None

    return choose

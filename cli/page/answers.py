"""What a request gives, and how it is answered: JSON both ways, errors in a line."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mergemill.cli import console
from mergemill.cli.page.form import NoForm
from mergemill.cli.page.gate import MOST_BODY_BYTES
from mergemill.cli.page.look import describe_error
from mergemill.engine import errors

Given = Mapping[str, Any]


def make_answer(work: Callable[[Given], Any]) -> Callable[[Request], Awaitable[Response]]:
    """Return what answers a request with the JSON of `work`, which is done in a thread; errors are told in a line."""

    async def answer(request: Request) -> Response:
        try:
            given = await _read_body(request) if request.method == "POST" else dict(request.query_params)
            return AsciiJson(await run_in_threadpool(work, given))
        except (errors.InputError, NoForm) as error:
            told = describe_error(error) if isinstance(error, errors.InputError) else {"message": str(error)}
            return AsciiJson({"faults": [], **told}, 400)
        except Exception as error:  # noqa: BLE001 -- the page goes on, and says what it was
            return AsciiJson({"message": console.explain(error), "faults": []}, 500)

    return answer


async def _read_body(request: Request) -> Given:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise errors.InputError(f"a request is more than {MOST_BODY_BYTES} bytes")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise errors.InputError("a request is no JSON") from None
    if not isinstance(given, dict):
        raise errors.InputError("a request is no JSON object")
    waiting: list[Any] = [given]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and any(mark == "\0" or "\ud800" <= mark <= "\udfff" for mark in value):
            raise errors.InputError("a request has a text with a NUL character, or half of a surrogate pair")
        waiting += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return given


class AsciiJson(JSONResponse):
    """JSON in ASCII, which holds the name of any file."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of a value."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def take_text(given: Given, key: str, default: str | None = None) -> str:
    """Return a text that a request gives, without blanks around it; `InputError` where it is missing."""
    value = given.get(key, default)
    if not isinstance(value, str) or (default is None and key != "text" and not value.strip()):
        raise errors.InputError(f"'{key}' is missing")
    return value if key == "text" else value.strip()

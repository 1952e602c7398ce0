"""The page's addresses: its own files, and JSON for its scripts."""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergemill.cli import console
from mergemill.cli.page import jobs, results, runs, shelf
from mergemill.cli.page.catalogue import make_catalogue
from mergemill.cli.page.form import NoForm, parse_form, write_form
from mergemill.cli.page.gate import MOST_BODY_BYTES, Address, find_refusal, make_headers
from mergemill.cli.page.look import check_text, describe_error, look, plan_text
from mergemill.cli.page.roots import check_model, check_out
from mergemill.cli.page.settings import Setup, parse_chosen
from mergemill.engine import abort, errors

STATIC = Path(__file__).parent / "static"
TICKET_S = 60.0  # for which a report may be opened after it was asked for

Given = Mapping[str, Any]


def make_app(setup: Setup, address: Address, token: str) -> "GuardedApp":
    """Return the page as an ASGI application; the process works in the root, from which recipes' paths go."""
    page = Desk(setup)
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "page.html")),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/shown/{ticket}", page.show_report),
        *(Route(f"/api/{name}", _answer(work), methods=["GET"]) for name, work in page.list_questions().items()),
        *(Route(f"/api/{name}", _answer(work), methods=["POST"]) for name, work in page.list_orders().items()),
    ]
    return GuardedApp(Starlette(routes=routes), address, token)


class GuardedApp:
    """Refuses what `gate.py` refuses, and puts its headers on every answer."""

    def __init__(self, app: ASGIApp, address: Address, token: str) -> None:
        self._app = app
        self._address = address
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; WebSockets, of which the page has none, are closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        added = [(name.encode(), value.encode()) for name, value in make_headers(self._address, path).items()]

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name != b"cache-control"]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        refused = find_refusal(self._address, self._token, method=scope["method"], path=path, headers=headers)
        if refused is None:
            await self._app(scope, receive, send_guarded)
        else:
            await JSONResponse({"message": refused[1], "faults": []}, refused[0])(scope, receive, send_guarded)


def _answer(work: Callable[[Given], Any]) -> Callable[[Request], Awaitable[Response]]:
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


class Desk:
    """What the page knows between requests: nothing that a restart would lose."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._watch = runs.OutputWatch()
        self._tickets: dict[str, tuple[float, Path]] = {}

    def list_questions(self) -> dict[str, Callable[[Given], Any]]:
        """Return what is only asked."""
        return {
            "start": self.tell_start,
            "models": lambda given: self._watch.list_models(self._setup.root),
            "facts": lambda given: shelf.describe_model(self._setup.root, _text(given, "model")),
            "hub": lambda given: shelf.search_hub(_text(given, "words")),
            "runs": lambda given: runs.list_runs(self._setup.root, self._watch),
            "run": lambda given: self._describe(self._find(given)),
            "result": lambda given: results.describe_result(self._setup.root, self._find(given)),
        }

    def list_orders(self) -> dict[str, Callable[[Given], Any]]:
        """Return what is done, or may be long."""
        return {
            "look": self.look,
            "write": lambda given: {"text": write_form(_text(given, "text"), parse_form(given.get("form") or {}))},
            "merge": self.merge,
            "compare": self.compare,
            "push": self.push,
            "cancel": lambda given: self._cancel(self._find(given)),
            "resume": lambda given: self._resume(self._find(given)),
            "abort": lambda given: self._abort(self._find(given)),
            "show": self.make_ticket,
        }

    def tell_start(self, given: Given) -> dict[str, Any]:
        """Return what a browser is told once."""
        from importlib.metadata import version
        from importlib.util import find_spec

        return {
            "version": version("mergemill"),
            "root": str(self._setup.root),
            "where": self._setup.scheduler or self._setup.cluster,
            "pictures": find_spec("vl_convert") is not None,
            "hub": find_spec("huggingface_hub") is not None,
            **make_catalogue(self._setup.methods),
        }

    def look(self, given: Given) -> dict[str, Any]:
        """Return what a recipe means now."""
        try:
            chosen = parse_chosen(given)
            out = _text(given, "out", "")
            out = check_out(self._setup.root, out) if out.strip() else ""
        except errors.InputError as error:
            return {**look(_text(given, "text"), "", parse_chosen({}), self._setup), "option_error": str(error)}
        return look(_text(given, "text"), out, chosen, self._setup)

    def merge(self, given: Given) -> dict[str, Any]:
        """Start a merge that can be planned, into a place where none is."""
        root, text, chosen = self._setup.root, _text(given, "text"), parse_chosen(given)
        out = check_out(root, _text(given, "out"))
        self._check_free(out)
        plan = plan_text(text, chosen, self._setup)
        report = bool(given.get("report")) and plan.origin.kind == "merge"
        with jobs.hold_starts(self._setup.root):
            self._check_free(out)
            return {"id": jobs.start_merge(self._setup, text, out, chosen, report=report).name}

    def compare(self, given: Given) -> dict[str, Any]:
        """Start a comparison of two models, or of what both changed of a third."""
        words = [_text(given, key) for key in ("first", "second")]
        words += [base] if (base := _text(given, "base", "")) else []
        for word in words:
            check_model(self._setup.root, word)
            _check_word(word)
        return {"id": self._start_other(jobs.COMPARE, words[0], words)}

    def push(self, given: Given) -> dict[str, Any]:
        """Start to publish a finished merge on the Hub."""
        job, repository = self._find(given), _text(given, "repository")
        _check_word(repository)
        state = self._describe(job)["state"]
        if not results.is_pushable(job, state):
            raise errors.InputError(f"{job.out}: only a finished merge is published")
        public = ["--public"] if given.get("public") is True else []
        return {"id": self._start_other(jobs.PUSH, job.out, [repository, *public])}

    def make_ticket(self, given: Given) -> dict[str, str]:
        """Return an address that shows a run's report once, soon: a new tab has no token."""
        path = results.find_report(self._setup.root, self._find(given))
        if path is None:
            raise errors.InputError("this run has no report")
        ticket, now = secrets.token_urlsafe(24), time.monotonic()
        self._tickets = {key: value for key, value in self._tickets.items() if value[0] > now}
        self._tickets[ticket] = now + TICKET_S, path
        return {"address": f"/shown/{ticket}"}

    async def show_report(self, request: Request) -> Response:
        """Answer with the report that a ticket is for."""
        until, path = self._tickets.pop(request.path_params["ticket"], (0.0, Path()))
        if until < time.monotonic():
            return JSONResponse({"message": "this address was for once; open the report from its run again"}, 404)
        return FileResponse(path, media_type="text/html")

    def _find(self, given: Given) -> "jobs.Errand":
        return runs.find_job(self._setup.root, _text(given, "id"), self._watch)

    def _describe(self, job: "jobs.Errand") -> dict[str, Any]:
        return runs.describe_run(self._setup.root, job, self._watch)

    def _check_free(self, out: str) -> None:
        self._watch.forget(out)
        job = jobs.read_job(self._setup.root, jobs.make_name(jobs.MERGE, out))
        if self._watch.look(out) is not None or (job is not None and jobs.is_alive(job)):
            raise errors.OutputError(f"{out}: a merge is there already; see its run, or name another place")

    def _start_other(self, kind: str, out: str, words: list[str]) -> str:
        with jobs.hold_starts(self._setup.root):
            job = jobs.read_job(self._setup.root, jobs.make_name(kind, out, *words))
            if job is not None and jobs.is_alive(job):
                return job.name
            return jobs.start_other(self._setup, kind, out, words).name

    def _cancel(self, job: "jobs.Errand") -> dict[str, Any]:
        if job.kind == jobs.MERGE:
            runs.cancel(job, self._watch)
        else:
            jobs.end(job)
        return {}

    def _resume(self, job: "jobs.Errand") -> dict[str, Any]:
        if not job.started:
            raise errors.InputError("this merge was not started here; its run shows the command that resumes it")
        if job.kind == jobs.MERGE:
            check_text(jobs.read_recipe(self._setup.root, job.name), self._setup)
        with jobs.hold_starts(self._setup.root):
            jobs.resume(self._setup, job)
        self._watch.forget(job.out)
        return {}

    def _abort(self, job: "jobs.Errand") -> dict[str, Any]:
        """Remove what a stopped merge has left, and the notes of a run that has ended; a finished output stays."""
        if jobs.is_alive(job):
            raise errors.InputError("it runs; cancel it first")
        if job.kind == jobs.MERGE and (found := self._watch.look(job.out)) and found.state == "unfinished":
            abort(job.out)
        jobs.forget(self._setup.root, job.name)
        self._watch.forget(job.out)
        return {}


def _check_word(word: str) -> None:
    if word.startswith("-"):
        raise errors.InputError(f"{word}: begins as an option does; write ./{word}")


def _text(given: Given, key: str, default: str | None = None) -> str:
    value = given.get(key, default)
    if not isinstance(value, str) or (default is None and key != "text" and not value.strip()):
        raise errors.InputError(f"'{key}' is missing")
    return value if key == "text" else value.strip()

"""The page's addresses: its own files, and JSON for its scripts."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergemill.cli.page.answers import make_answer
from mergemill.cli.page.desk import Desk
from mergemill.cli.page.gate import Address, find_refusal, make_headers
from mergemill.cli.page.settings import Setup

STATIC = Path(__file__).parent / "static"


def make_app(setup: Setup, address: Address, token: str) -> "GuardedApp":
    """Return the page as an ASGI application; the process works in the root, from which recipes' paths go."""
    page = Desk(setup)
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "page.html")),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/shown/{ticket}", page.show_report),
        *(Route(f"/api/{name}", make_answer(work), methods=["GET"]) for name, work in page.list_questions().items()),
        *(Route(f"/api/{name}", make_answer(work), methods=["POST"]) for name, work in page.list_orders().items()),
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

"""A small web server, for the stand-ins that answer from memory and files: answers are values, in HTTP/1.1."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from servers.asked import parse_range

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets."""

    status: int
    body: bytes | Path = b""
    """The content; a file goes out without being read into memory."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Headers, besides the length."""


class Web(ThreadingHTTPServer):
    """A web server that runs, a thread for each connection."""

    daemon_threads = True
    request_queue_size = 512

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone; they are what the tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class WebHandler(BaseHTTPRequestHandler):
    """One connection; who inherits it has a method for each method of HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def read_pieces(self) -> Iterator[bytes]:
        """Yield the body of the request, by length or by chunks; raise ConnectionError where it breaks off."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read_exactly(int(self.headers.get("Content-Length", 0)))
            return
        while size_bytes := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._read_exactly(size_bytes)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def send(self, answer: Answer) -> None:
        """Send an answer: of a body with status 200 the range that was asked for, as 206, or 416."""
        size_bytes = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        span = parse_range(self.headers.get("Range", "")) if answer.status == 200 else None
        if span is None:
            self._send(answer, 0, size_bytes)
            return
        start, stop, _ = slice(*span).indices(size_bytes)
        if start >= stop:
            self._send(Answer(416, b"", {"Content-Range": f"bytes */{size_bytes}"}), 0, 0)
            return
        fields = {**answer.fields, "Content-Range": f"bytes {start}-{stop - 1}/{size_bytes}"}
        self._send(Answer(206, answer.body, fields), start, stop)

    def note_answer(self, status: int, sent_bytes: int) -> None:
        """Learn what is about to be sent; to be overridden."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _send(self, answer: Answer, start: int, stop: int) -> None:
        self.send_response(answer.status)
        for name, value in {"Accept-Ranges": "bytes", **answer.fields, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        self.note_answer(answer.status, 0 if self.command == "HEAD" else stop - start)
        self.end_headers()
        if self.command == "HEAD" or start == stop:
            return
        if isinstance(answer.body, bytes):
            self.wfile.write(memoryview(answer.body)[start:stop])
            return
        with answer.body.open("rb") as file:
            self.connection.sendfile(file, start, stop - start)

    def _read_exactly(self, size_bytes: int) -> Iterator[bytes]:
        while size_bytes:
            piece = self.rfile.read(min(size_bytes, PIECE_BYTES))
            if not piece:
                raise ConnectionResetError("the client has gone in the middle of a body")
            yield piece
            size_bytes -= len(piece)


@contextlib.contextmanager
def serve(web: Web) -> Iterator[None]:
    """Let a server answer until the caller is done."""
    thread = threading.Thread(target=web.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        web.shutdown()
        thread.join()
        web.server_close()

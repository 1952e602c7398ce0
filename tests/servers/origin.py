"""A plain web server: files in memory by range, with ETags; PUT writes them. No keys, no signatures."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from servers.asked import parse_range


class Origin(ThreadingHTTPServer):
    """A web server that runs, and its files."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        """By path, which begins with a slash."""

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Origin

    def do_GET(self) -> None:
        """Send a file or a range of it, as 200 or 206."""
        content = self.server.files.get(self.path)
        if content is None:
            return self._answer(404, b"no such file\n")
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start, stop, _ = slice(*(parse_range(self.headers.get("Range", "")) or (0, None))).indices(len(content))
        if "Range" not in self.headers:
            return self._answer(200, content, ETag=etag)
        if start >= stop:
            return self._answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], **{"ETag": etag, "Content-Range": span})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """Keep a file once all of it is there."""
        size_bytes = int(self.headers["Content-Length"])
        content = self.rfile.read(size_bytes)
        if len(content) == size_bytes:
            self.server.files[self.path] = content
            self._answer(200, b"")

    def _answer(self, status: int, body: bytes, **fields: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def start_origin(**files: bytes) -> Iterator[Origin]:
    """Start a web server; `files` are at the root of it."""
    with Origin() as origin:
        origin.files |= {f"/{name}": content for name, content in files.items()}
        thread = threading.Thread(target=origin.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield origin
        finally:
            origin.shutdown()
            thread.join()

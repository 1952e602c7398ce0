"""A plain web server: files in memory by range, with ETags; PUT writes them. No keys, no signatures."""

import contextlib
import hashlib
from collections.abc import Iterator

from servers.web import Answer, Web, WebHandler, serve


class Origin(Web):
    """A web server that runs, and its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OriginHandler)
        self.files: dict[str, bytes] = {}
        """By path, which begins with a slash."""


class OriginHandler(WebHandler):
    """One connection."""

    server: Origin

    def do_GET(self) -> None:
        """Send a file or a range of it."""
        if (content := self.server.files.get(self.path)) is None:
            self.send(Answer(404, b"no such file\n"))
        else:
            self.send(Answer(200, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """Keep a file once all of it is there."""
        self.server.files[self.path] = b"".join(self.read_pieces())
        self.send(Answer(200))


@contextlib.contextmanager
def start_origin(**files: bytes) -> Iterator[Origin]:
    """Start a web server; `files` are at the root of it."""
    origin = Origin()
    origin.files |= {f"/{name}": content for name, content in files.items()}
    with serve(origin):
        yield origin

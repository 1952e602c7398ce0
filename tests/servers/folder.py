"""A folder as a bucket of S3 that can be read: sparse files of any size, which no other server would hold.

It lists, and answers HEAD and GET of ranges with conditions. It checks no signature and takes no objects.

`python -m servers.folder FOLDER` serves one until its input ends.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from servers.asked import parse_range
from servers.journal import Exchange, Journal
from servers.processes import start_process
from servers.s3 import S3
from servers.web import Answer, Web, WebHandler, serve

XML = {"Content-Type": "application/xml"}


class FolderWeb(Web):
    """The server; every bucket is the same folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), FolderHandler)
        self.folder = folder
        self.journal = Journal()


class FolderHandler(WebHandler):
    """One connection."""

    server: FolderWeb
    _exchange: Exchange

    def do_GET(self) -> None:
        """Answer."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._exchange = self.server.journal.open(self.command, self.path, headers)
        target = urlsplit(self.path)
        parameters = dict(parse_qsl(target.query, keep_blank_values=True))
        _, _, key = unquote(target.path).lstrip("/").partition("/")
        if "list-type" in parameters:
            self.send(list_objects(self.server.folder, parameters.get("prefix", "")))
            return
        file = self.server.folder / key
        if not key or not file.is_file():
            self.send(make_error(404, "NoSuchKey"))
            return
        etag = make_etag(file)
        if headers.get("if-match", etag) != etag:
            self.send(make_error(412, "PreconditionFailed"))
            return
        assert self.command == "HEAD" or parse_range(headers.get("range", "")), "nobody reads such a file whole"
        self.send(Answer(200, file, {"ETag": etag}))

    do_HEAD = do_GET

    def note_answer(self, status: int, sent_bytes: int) -> None:
        """Count what goes out."""
        self._exchange.status = status
        self._exchange.note_sent(sent_bytes)


def list_objects(folder: Path, prefix: str) -> Answer:
    """Return the objects of one folder, as with the delimiter ``/``."""
    place = folder / prefix
    files = sorted(place.iterdir()) if place.is_dir() else []
    found = [
        f"<Contents><Key>{escape(prefix + file.name)}</Key><Size>{file.stat().st_size}</Size>"
        f"<ETag>{escape(make_etag(file))}</ETag></Contents>"
        for file in files
        if file.is_file()
    ]
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
    return Answer(200, f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode(), XML)


def make_error(status: int, code: str) -> Answer:
    """Return an error as S3 words it."""
    return Answer(status, f"<Error><Code>{code}</Code></Error>".encode(), XML)


def make_etag(file: Path) -> str:
    """Return what changes with the file; not its MD5, for which it would have to be read."""
    found = file.stat()
    return f'"{hashlib.md5(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()}"'


@contextlib.contextmanager
def start_folder(folder: Path) -> Iterator[tuple[S3, Journal]]:
    """Serve a folder until the caller is done; lend the server, and what it was asked for."""
    web = FolderWeb(folder)
    with serve(web):
        yield connect_to(web.url), web.journal


@contextlib.contextmanager
def start_folder_process(folder: Path) -> Iterator[S3]:
    """Serve a folder by a process of its own: for benchmarks, whose client keeps its interpreter busy."""
    with start_process("servers.folder", str(folder)) as url:
        yield connect_to(url)


def connect_to(url: str) -> S3:
    """Return a server of a folder, with keys that a client needs and nobody checks."""
    return S3(url, "folder", "nobody checks it")


def main() -> None:
    """Serve the folder that the command line names, say where, and end with the input."""
    with start_folder(Path(sys.argv[1])) as (server, _):
        print(server.url, flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()

"""Heads of HTTP/1.1, and where the bodies after them end. `pump` moves the bodies.

Source: RFC 9112, sections 2.1 (messages) and 6.3 (where a body ends).
"""

import socket
from dataclasses import dataclass

HEAD_BYTES = 1 << 16


class Ended(Exception):
    """The sender of a message is gone before its end."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a message, and its headers in their order."""

    first: str
    fields: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        """Return the value of the first header of that name, written in small letters."""
        return next((value for key, value in self.fields if key.lower() == name), None)

    def put(self, name: str, value: str | None) -> "Head":
        """Return the head with this header in place of all of its name, or without any."""
        others = tuple((key, old) for key, old in self.fields if key.lower() != name)
        return Head(self.first, others if value is None else (*others, (name, value)))

    @property
    def status(self) -> int:
        """The status, in the head of an answer."""
        return int(self.first.split(" ", 2)[1])

    @property
    def closes(self) -> bool:
        """Whether the sender closes the connection after this message."""
        return (self.get("connection") or "").lower() == "close" or "HTTP/1.0" in self.first

    def encode(self) -> bytes:
        """Return the head as it is sent."""
        return "\r\n".join([self.first, *(f"{key}: {value}" for key, value in self.fields), "", ""]).encode("latin-1")


def parse_head(data: bytes) -> Head:
    """Return the head that these bytes are."""
    first, *lines = data.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Head(first, tuple((key, value.strip()) for key, _, value in pairs))


def find_body_bytes(head: Head, *, answers: str = "") -> int | None:
    """Return the size of the body after this head: None where the body itself says where it ends.

    `answers` is the method of the request that an answer is for.
    """
    if answers and (answers == "HEAD" or head.status < 200 or head.status in (204, 304)):
        return 0
    if is_chunked(head):
        return None
    length = head.get("content-length")
    if length is None:
        return None if answers else 0
    return int(length)


def is_chunked(head: Head) -> bool:
    """Whether the body comes in chunks."""
    return (head.get("transfer-encoding") or "").lower() == "chunked"


class Wire:
    """One side of a conversation: a socket, and what has come over it before it was asked for."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.waiting = bytearray()

    def read_until(self, mark: bytes) -> bytes | None:
        """Return the bytes to the end of `mark`, None where the other side closed before the first of them."""
        while (at := self.waiting.find(mark)) < 0:
            more = self.socket.recv(HEAD_BYTES)
            if not more and self.waiting:
                raise Ended
            if not more:
                return None
            self.waiting += more
        return self.take(at + len(mark))

    def read_head(self) -> Head | None:
        """Return the next head, None where the other side has closed."""
        data = self.read_until(b"\r\n\r\n")
        return None if data is None else parse_head(data)

    def read_line(self) -> bytes:
        """Return the next line, with its end."""
        if (line := self.read_until(b"\r\n")) is None:
            raise Ended
        return line

    def take(self, size_bytes: int) -> bytes:
        """Return at most so many of the bytes that wait."""
        taken = bytes(self.waiting[:size_bytes])
        del self.waiting[:size_bytes]
        return taken

"""The two connections that a proxy holds for one client: the client's, and its own to the server."""

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass

from servers.http1 import Head, Wire, is_chunked
from servers.pump import Outlet, Pace, Pump

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time at all: closing sends RST."""


@dataclass(frozen=True, slots=True)
class Far:
    """How far away the server seems to be."""

    latency_s: float
    """Before each request."""
    rate: float
    """Bytes a second of one connection, both ways together."""


class Link:
    """Both connections, and what moves bodies between them."""

    def __init__(self, client: socket.socket, address: tuple[str, int], far: Far) -> None:
        self.client = Wire(client)
        self.far = far
        self._address = address
        self._server: Wire | None = None
        self._pump = Pump()
        self._stopped = threading.Event()

    def reach_server(self) -> Wire:
        """Return the connection to the server: the one there is, unless the server has closed it meanwhile."""
        if self._server and find_readable(self._server, timeout_s=0):
            self.leave_server()
        if not self._server:
            self._server = Wire(socket.create_connection(self._address))
        return self._server

    def leave_server(self) -> None:
        """Close the connection to the server; the next request gets another."""
        if self._server:
            self._server.socket.close()
        self._server = None

    def make_pace(self, rate: float) -> Pace:
        """Return the pace of one body: that of this connection, or that of a fault if it is slower."""
        return Pace(min(rate, self.far.rate))

    def move(self, source: Wire, outlet: Outlet, head: Head, size_bytes: int | None) -> None:
        """Pass on the body after this head: of that size, or to where it says that it ends."""
        if size_bytes is not None:
            self._pump.move(source, outlet, size_bytes)
        elif is_chunked(head):
            self._pump.move_chunks(source, outlet)
        else:
            self._pump.move_rest(source, outlet)

    def renew_pump(self) -> None:
        """Forget what a receiver did not take."""
        self._pump.close()
        self._pump = Pump()

    def wait(self, time_s: float) -> None:
        """Return after this time, or when the connections are to end."""
        if time_s:
            self._stopped.wait(time_s)

    def interrupt(self) -> None:
        """End both connections, from another thread."""
        for wire in (self.client, self._server):
            with contextlib.suppress(OSError):
                if wire:
                    wire.socket.shutdown(socket.SHUT_RDWR)
        self._stopped.set()  # last: what waits must not go on with connections that still work

    def close(self, *, reset: bool) -> None:
        """Close both connections, with RST if so asked."""
        for wire in (self.client, self._server):
            if wire and reset:
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            if wire:
                wire.socket.close()
        self._pump.close()


def find_readable(*wires: Wire, timeout_s: float | None = None) -> Wire | None:
    """Return the first of the wires over which something has come, or an end; None if nothing does in time."""
    poll = select.poll()
    for wire in wires:
        poll.register(wire.socket, select.POLLIN)
    ready = {number for number, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return next((wire for wire in wires if wire.socket.fileno() in ready), None)

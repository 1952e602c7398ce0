"""One request on its way through a proxy, and its answer on the way back, with the fault that it meets."""

import os
from dataclasses import dataclass

from servers.faults import Fault
from servers.http1 import Ended, Head, Wire, find_body_bytes, is_chunked
from servers.journal import Exchange
from servers.link import Link, find_readable
from servers.pump import Cut, Outlet, Unwanted


@dataclass(frozen=True, slots=True)
class Passage:
    """One request; `run` is all there is to it."""

    link: Link
    head: Head
    """Of the request."""
    exchange: Exchange
    """Where it is noted how far this has come."""
    fault: Fault

    def run(self) -> bool:
        """Pass on the request and its answer; return whether the client may send another. Raises Cut for the fault."""
        self.link.wait(self.link.far.latency_s)
        return self._refuse() if self.fault.status else self._pass()

    def _refuse(self) -> bool:
        """Answer in the server's place, after the body unless the client waits to be told to send it."""
        waits = self.head.get("expect") is not None and not self.link.client.waiting
        if not waits:
            with open(os.devnull, "wb") as nowhere:
                self._move_request(nowhere.fileno(), None)
        self.link.wait(self.fault.delay_s)
        answer, body = make_error(self.fault, closes=waits)
        body = b"" if self.exchange.request.method == "HEAD" else body
        self.exchange.status = answer.status
        self.exchange.sent_bytes += len(body)
        self.link.client.socket.sendall(answer.encode() + body)
        return not waits and not self.head.closes

    def _pass(self) -> bool:
        """Have the server answer."""
        server = self.link.reach_server()
        server.socket.sendall((self.head.put("range", None) if self.fault.whole else self.head).encode())
        early = self._send_request(server)
        answer = early or self._read_answer(server)
        self.exchange.status = answer.status
        self.link.wait(self.fault.delay_s)
        if self.fault.silent:
            raise Cut
        self._send_answer(server, answer.put("connection", "close") if early else answer)
        endless = find_body_bytes(answer, answers=self.exchange.request.method) is None and not is_chunked(answer)
        if answer.closes or early:
            self.link.leave_server()
        return not (answer.closes or early or self.head.closes or endless)

    def _send_request(self, server: Wire) -> Head | None:
        """Pass on the request's body; return the answer if the server gave it before it had all of that."""
        if self.head.get("expect") and (early := self._await_go(server)):
            return early
        try:
            self._move_request(server.socket.fileno(), self.fault.cut_upload_after_bytes)
        except Unwanted:
            self.link.renew_pump()
            return self._read_answer(server)
        return None

    def _await_go(self, server: Wire) -> Head | None:
        """Return the answer that the server gives to the head alone, None if the body may come."""
        client = self.link.client
        if client.waiting or find_readable(server, client) is client:
            return None
        answer = server.read_head()
        if answer is None:
            raise Ended
        if answer.status != 100:
            return answer
        client.socket.sendall(answer.encode())
        return None

    def _read_answer(self, server: Wire) -> Head:
        """Return the head of the answer, after passing on those that only announce it."""
        while answer := server.read_head():
            if answer.status >= 200:
                return answer
            self.link.client.socket.sendall(answer.encode())
        raise Ended

    def _move_request(self, target: int, cut_after_bytes: int | None) -> None:
        """Pass on the request's body to a descriptor."""
        outlet = Outlet(target, self.link.make_pace(self.fault.rate), self.exchange.note_received, cut_after_bytes)
        self.link.move(self.link.client, outlet, self.head, find_body_bytes(self.head))

    def _send_answer(self, server: Wire, answer: Head) -> None:
        """Pass on the answer, as the fault has it."""
        client, fault = self.link.client.socket, self.fault
        client.sendall(change_head(answer, fault).encode())
        outlet = Outlet(
            client.fileno(), self.link.make_pace(fault.rate), self.exchange.note_sent, fault.cut_after_bytes
        )
        outlet.other_bytes = fault.other_bytes
        size_bytes = find_body_bytes(answer, answers=self.exchange.request.method)
        if not size_bytes or not fault.longer_bytes:
            self.link.move(server, outlet, answer, size_bytes)
            return
        self.link.move(server, outlet, answer, max(0, size_bytes + min(0, fault.longer_bytes)))
        if fault.longer_bytes > 0:
            outlet.write(bytes(fault.longer_bytes))
        else:
            self.link.leave_server()  # it has more to say


def change_head(answer: Head, fault: Fault) -> Head:
    """Return the head that the client sees in place of the server's."""
    length, changed = answer.get("content-length"), answer
    if fault.longer_bytes and int(length or 0):
        changed = changed.put("content-length", str(max(0, int(length or 0) + fault.longer_bytes)))
    for name in ("etag", "x-linked-etag"):
        if fault.other_etag and (etag := answer.get(name)):
            changed = changed.put(name, '"' + etag.strip('"')[::-1] + '"')
    return changed


def make_error(fault: Fault, *, closes: bool) -> tuple[Head, bytes]:
    """Return the answer of a server that refuses, in the words of S3."""
    body = f"<Error><Code>{fault.code}</Code><Message>The proxy of the tests refuses.</Message></Error>".encode()
    fields = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
    ends = (("Connection", "close"),) if closes else ()
    return Head(f"HTTP/1.1 {fault.status} {fault.code}", (*fields, *ends)), body

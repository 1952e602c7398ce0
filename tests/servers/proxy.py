"""A proxy of HTTP/1.1 that makes the faults a test asks for, and models the latency and bandwidth of a far server.

It passes on what it has no reason to change, the Host header above all: a client signs for the address of the proxy,
and S3 servers check the signature against the Host that they are told. Bodies pass within the kernel.

`python -m servers.proxy http://127.0.0.1:8333 --latency 0.03 --rate 90e6` runs one until its input ends.
"""

import argparse
import contextlib
import math
import socket
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from servers.faults import Fault, Rule, never
from servers.http1 import Ended, Head
from servers.journal import Journal
from servers.link import Far, Link
from servers.passage import Passage
from servers.processes import start_process
from servers.pump import Cut, Unwanted

NOTHING = Fault("nothing")


class Proxy:
    """A proxy that runs, a thread for each connection."""

    def __init__(self, upstream: str, rule: Rule, far: Far) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname
        assert parts.port
        self.rule = rule
        """Says what goes wrong; another may be put in its place at any time."""
        self.journal = Journal()
        """What has passed."""
        self._address = parts.hostname, parts.port
        self._far = far
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._lock = threading.Lock()
        self._live: dict[Link, threading.Thread] = {}
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Take connections from now on."""
        self._acceptor.start()

    def stop(self) -> None:
        """End all connections, and take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            live = list(self._live.items())
        for link, thread in live:
            link.interrupt()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            link = Link(client, self._address, self._far)
            thread = threading.Thread(target=self._converse, args=(link,), daemon=True)
            with self._lock:
                self._live[link] = thread
            thread.start()

    def _converse(self, link: Link) -> None:
        """Pass on requests and answers until either side ends, or a fault ends both."""
        reset = True  # so a side learns that the other has gone in the middle of a message
        try:
            while (head := link.client.read_head()) and (passage := self._begin(link, head)).run():
                pass
            reset = False
        except Cut:
            reset = passage.fault.reset
        except (Ended, Unwanted, OSError):
            pass
        finally:
            link.close(reset=reset)
            with self._lock:
                del self._live[link]

    def _begin(self, link: Link, head: Head) -> Passage:
        """Note a request, and ask the rule what becomes of it."""
        method, target, _ = head.first.split(" ", 2)
        exchange = self.journal.open(method, target, {key.lower(): value for key, value in head.fields})
        exchange.fault = self.rule(exchange.request)
        return Passage(link, head, exchange, exchange.fault or NOTHING)


@contextlib.contextmanager
def start_proxy(
    upstream: str, rule: Rule = never, *, latency_s: float = 0.0, rate: float = math.inf
) -> Iterator[Proxy]:
    """Start a proxy in front of the server at the URL `upstream`.

    `latency_s` passes before each request reaches the server; `rate` is in bytes a second and holds for each
    connection.
    """
    proxy = Proxy(upstream, rule, Far(latency_s, rate))
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@contextlib.contextmanager
def start_proxy_process(upstream: str, *, latency_s: float = 0.0, rate: float = math.inf) -> Iterator[str]:
    """Start a proxy in a process of its own, and lend its URL: for benchmarks, whose client keeps its interpreter busy.

    It makes no faults and keeps no journal that could be asked.
    """
    options = ["--latency", str(latency_s), "--rate", str(rate)]
    with start_process("servers.proxy", upstream, *options) as url:
        yield url


def main() -> None:
    """Run a proxy without faults, say where it listens, and end with the input."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("upstream")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=math.inf)
    options = parser.parse_args()
    with start_proxy(options.upstream, latency_s=options.latency, rate=options.rate) as proxy:
        print(proxy.url, flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()

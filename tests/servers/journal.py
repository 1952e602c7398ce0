"""What passed through a server, for tests to assert on."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from servers.asked import Request, make_request, name_same
from servers.faults import Fault


@dataclass(slots=True)
class Exchange:
    """One request and how far its answer has come; counted before the client can see it."""

    request: Request
    fault: Fault | None = None
    status: int = 0
    """Of the answer; 0 where there was none."""
    sent_bytes: int = 0
    """Of the answer's body, to the client."""
    received_bytes: int = 0
    """Of the request's body, from the client."""

    def note_sent(self, size_bytes: int) -> None:
        """Count bytes that are about to go to the client."""
        self.sent_bytes += size_bytes

    def note_received(self, size_bytes: int) -> None:
        """Count bytes that have come from the client."""
        self.received_bytes += size_bytes


class Journal:
    """All exchanges, in the order in which they began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._exchanges: list[Exchange] = []

    def open(self, method: str, target: str, headers: Mapping[str, str]) -> Exchange:
        """Return a new exchange, for this request."""
        same = name_same(method, target, headers)
        with self._lock:
            request = make_request(len(self._exchanges), self._attempts[same], method, target, headers)
            self._attempts[same] += 1
            self._exchanges.append(Exchange(request))
            return self._exchanges[-1]

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The exchanges so far."""
        with self._lock:
            return tuple(self._exchanges)

    def count(self) -> Counter[str]:
        """Return how many requests there were of each kind."""
        return Counter(exchange.request.kind for exchange in self.exchanges)

    def count_faults(self) -> Counter[str]:
        """Return how many requests met each kind of fault."""
        return Counter(exchange.fault.name for exchange in self.exchanges if exchange.fault)

    def find_ranges(self, path: str) -> list[tuple[int, int | None] | None]:
        """Return the ranges that GET asked for of one path, in the order of asking."""
        asked = [exchange.request for exchange in self.exchanges]
        return [request.range for request in asked if request.method == "GET" and request.path == path]

    @property
    def sent_bytes(self) -> int:
        """All bytes of bodies that went to clients."""
        return sum(exchange.sent_bytes for exchange in self.exchanges)

    @property
    def received_bytes(self) -> int:
        """All bytes of bodies that came from clients."""
        return sum(exchange.received_bytes for exchange in self.exchanges)

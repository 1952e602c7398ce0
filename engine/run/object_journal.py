"""The journal of an output whose storage cannot append: receipts in objects of some each."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict

from mergemill.engine.run.receipts import Receipt
from mergemill.engine.storage.objects import Objects
from mergemill.engine.storage.ranges import join

FLUSH_S = 1.0  # receipts that a killed driver may lose: those of the last second, whose parts are then merged again


class ObjectJournal:
    """Receipts in objects of some each, since objects cannot be appended to: ``journal/`` and ``committed``."""

    def __init__(self, objects: Objects, url: str) -> None:
        self._objects = objects
        self._url = url
        self._known: list[Receipt] | None = None
        self._waiting: list[Receipt] = []
        self._flushed_s = time.monotonic()

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        if self._known is None:
            names = sorted(self._objects.list_objects(join(self._url, "journal")))
            texts = self._objects.get_all([join(self._url, f"journal/{name}") for name in names])
            self._known = [Receipt(**line) for text in texts for line in json.loads(text or b"[]")]
        yield from [*self._known, *self._waiting]

    def is_committed(self) -> bool:
        """Whether the merge was finished."""
        return self._objects.get(join(self._url, "committed")) is not None

    def append(self, receipt: Receipt) -> None:
        """Add a receipt; it is in the storage a second later at the latest, or once the output is let go."""
        self._waiting.append(receipt)
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the receipts that wait."""
        if self._waiting:
            lines = json.dumps([asdict(receipt) for receipt in self._waiting])
            self._objects.put(join(self._url, f"journal/{time.time_ns():020d}.json"), lines.encode(), absent=True)
            self._known = [*(self._known or ()), *self._waiting] if self._known is not None else None
            self._waiting = []
        self._flushed_s = time.monotonic()

    def append_commit(self) -> None:
        """Note that the output is whole."""
        self.flush()
        self._objects.put(join(self._url, "committed"), b"{}")

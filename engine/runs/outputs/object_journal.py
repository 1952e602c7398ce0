"""The journal of an output whose storage cannot append: receipts in objects of some each."""

import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict

from mergemill.engine.checkpoint.unfinished import COMMITTED
from mergemill.engine.errors import StorageError
from mergemill.engine.runs.outputs.receipts import Receipt, parse_receipts
from mergemill.engine.storage.objects import Objects
from mergemill.engine.storage.ranges import join
from mergemill.engine.storage.store import is_on_disk

FLUSH_S = 1.0  # receipts that a killed driver may lose: those of the last second, whose parts are then merged again


class ObjectJournal:
    """Receipts in objects of some each, since objects cannot be appended to: ``journal/`` and ``committed``."""

    def __init__(self, objects: Objects, url: str) -> None:
        self._objects = objects
        self._url = url
        self._known: list[Receipt] | None = None
        self._names: set[str] = set()  # of objects that were read or written
        self._followed: set[str] = set()  # names of objects
        self._waiting: list[Receipt] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        if self._known is None:
            names = self._list()
            self._names.update(names)
            self._known = self._fetch(names)
        yield from [*self._known, *self._waiting]

    def follow(self) -> Iterator[Receipt]:
        """Yield the receipts that were written since this was last asked, whoever wrote them."""
        names = [name for name in self._list() if name not in self._followed]
        self._followed.update(names)
        yield from self._fetch(names)

    def find_lost(self) -> str | None:
        """Return the URL of an object of receipts that somebody has removed since it was read or written."""
        lost = sorted(self._names - set(self._list()))
        return join(self._url, f"journal/{lost[0]}") if lost else None

    def _list(self) -> list[str]:
        return sorted(self._objects.list_objects(join(self._url, "journal")))

    def _fetch(self, names: Sequence[str]) -> list[Receipt]:
        urls = [join(self._url, f"journal/{name}") for name in names]
        texts = dict(zip(urls, self._objects.get_all(urls), strict=True))
        return [receipt for text in texts.values() for receipt in parse_receipts(text or b"[]") or ()]

    def is_committed(self) -> bool:
        """Whether the merge was finished, be it that its folder (``local://…``) was named as a path then."""
        if self._objects.get(join(self._url, "committed")) is not None:
            return True
        lines = self._objects.get(join(self._url, "journal.jsonl")) if is_on_disk(self._url) else None
        return COMMITTED in (lines or b"").split(b"\n")

    def append(self, receipt: Receipt) -> None:
        """Add a receipt; it is in the storage a second later, or once the output is let go."""
        with self._lock:
            self._waiting.append(receipt)
            if self._timer is None:
                self._timer = threading.Timer(FLUSH_S, self._flush_in_time)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write the receipts that wait."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._waiting:
                return
            lines = json.dumps([asdict(receipt) for receipt in self._waiting]).encode()
            name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
            self._objects.put(join(self._url, f"journal/{name}"), lines)
            self._names.add(name)
            if self._known is not None:
                self._known += self._waiting
            self._waiting = []

    def _flush_in_time(self) -> None:
        with suppress(StorageError):  # the next receipt, or the commit, tries again and says what is wrong
            self.flush()

    def append_commit(self) -> None:
        """Note that the output is whole."""
        self.flush()
        self._objects.put(join(self._url, "committed"), b"{}")

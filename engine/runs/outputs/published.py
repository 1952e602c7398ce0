"""What a repository of the Hub holds of a merge once it is committed: its files, record and receipts, read by range."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TypeVar

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import Absent, OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.receipts import Receipt, parse_receipts
from mergemill.engine.runs.outputs.record import Record, hide_places, make_record, parse_record
from mergemill.engine.runs.outputs.state import RECORD_NAME
from mergemill.engine.storage.ranges import Pin, join, pin_file, read_whole
from mergemill.engine.storage.store import Storage, store_of

T = TypeVar("T")

JOURNAL_NAME = f"{STATE_NAME}/journal.json"


class Published:
    """The main branch of the repository at `url`, as it was when its record was last read."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._url = url
        self._storage = storage
        self._at: str | None = None  # its URL at a commit

    def read_record(self) -> Record | None:
        """Return what is committed there now; None where that is no merge."""
        self._at = _find(lambda: store_of(self._url, self._storage).resolve(self._url, None))
        data = self._read(RECORD_NAME)
        return None if data is None else parse_record(data, join(self._url, RECORD_NAME))

    def read_receipts(self) -> list[Receipt]:
        """Return the receipts of its parts."""
        receipts = parse_receipts(self._read(JOURNAL_NAME) or b"[]")
        if receipts is None:
            where = join(self._url, JOURNAL_NAME)
            raise OutputError(
                f"{where}: is damaged, or not of this version of mergemill; merge into another repository"
            )
        return receipts

    def find(self, name: str) -> Pin | None:
        """Return the pin of a file."""
        at = self._at
        return None if at is None else _find(lambda: pin_file(join(at, name), self._storage))

    def _read(self, name: str) -> bytes | None:
        pin = self.find(name)
        return None if pin is None else read_whole(pin, storage=self._storage)


def make_state(plan: Plan, receipts: Iterable[Receipt], storage: Storage) -> Mapping[str, bytes]:
    """Return the files beside a merge by which it can be verified: nothing in them tells of this machine's folders."""
    lines = [json.dumps(asdict(receipt)) for receipt in receipts]
    return {
        RECORD_NAME: hide_places(make_record(plan, storage)).to_json(),
        JOURNAL_NAME: ("[" + ",\n".join(lines) + "]\n").encode(),
    }


def _find(look: Callable[[], T]) -> T | None:
    """Return what is found; None where nothing is there."""
    try:
        return look()
    except Absent:
        return None

"""A lock beside an output in object storage: an object that its holder renews, and that others take when it is old."""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage import system
from mergemill.engine.storage.objects import Objects

RENEW_S, OLD_S = 20.0, 90.0
_held: set[str] = set()  # tokens of the leases that threads of this process hold


class Lease:
    """The object at `url`, held for this process; the output that it is for is called `where`."""

    def __init__(self, objects: Objects, url: str, where: str) -> None:
        self._objects = objects
        self._url = url
        self._where = where
        self.token = secrets.token_hex(8)
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": name_processes(),
            "started": find_start(os.getpid()),
            "token": self.token,
        }
        self._data = json.dumps(own).encode()

    def take(self) -> None:
        """Write the object; `OutputError` while another one holds it."""
        if not self._objects.put(self._url, self._data, absent=True, error=OutputError):
            _check_abandoned(self._objects, self._url, self._where)
            self._objects.put(self._url, self._data)
            self.check()  # of two that find it abandoned, the last one has it

    def check(self) -> None:
        """Raise `OutputError` where another one has taken it meanwhile, as after a long sleep of this process."""
        if not self._is_held():
            raise OutputError(f"{self._where}: another mergemill has begun to write here; wait for it or stop it")

    def renew(self, stop: threading.Event) -> None:
        """Write it again now and then, until `stop`, or until another one has it."""
        while not stop.wait(RENEW_S):
            with suppress(StorageError):  # the merge itself will say what is wrong with the storage
                if not self._is_held():
                    return
                self._objects.put(self._url, self._data)

    def release(self) -> None:
        """Remove it, unless another one has it."""
        with suppress(StorageError):  # then it is forgotten when it is old
            if self._is_held():
                self._objects.delete([self._url])

    def _is_held(self) -> bool:
        return self._objects.get(self._url) == self._data


@contextmanager
def hold_lease(objects: Objects, url: str, where: str) -> Iterator[Lease]:
    """Hold the object at `url` for this process; `OutputError` while another one does, calling the output `where`."""
    lease = Lease(objects, url, where)
    stop = threading.Event()
    keeper = threading.Thread(target=lease.renew, args=(stop,), name="mergemill-lease", daemon=True)
    _held.add(lease.token)
    try:
        lease.take()
        keeper.start()
        try:
            yield lease
        finally:
            stop.set()
            keeper.join()
            lease.release()
    finally:
        _held.discard(lease.token)


def _check_abandoned(objects: Objects, url: str, where: str) -> None:
    """Raise `OutputError` unless who holds the lease is gone."""
    holder = _parse(objects.get(url))
    if holder.get("processes") == name_processes() and not _runs(holder):
        return
    age_s = objects.get_age(url)
    if age_s is None or age_s > OLD_S:
        return
    raise OutputError(
        f"{where}: another mergemill is writing here (process {holder.get('pid')} of {holder.get('host')}, seen "
        f"{age_s:.0f} s ago); wait for it or stop it; one that was killed is forgotten after {OLD_S:.0f} s"
    )


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _runs(holder: dict[str, Any]) -> bool:
    """Whether the holder, a process that would be seen from here, is there still, and holds the lease."""
    if holder.get("pid") == os.getpid() and holder.get("token") not in _held:
        return False
    return find_start(holder.get("pid")) == holder.get("started")


def name_processes() -> str:
    """Return what two processes share that see each other by number; nobody else's where that is not known."""
    return system.name_start() or secrets.token_hex(8)


def find_start(process: object) -> str | None:
    """Return when a process began; None where it has ended, or a note that is damaged names none."""
    return system.find_start(process) if type(process) is int else None

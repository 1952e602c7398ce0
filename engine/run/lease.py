"""A lock beside an output in object storage: an object that its holder renews, and that others take when it is old."""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage.objects import Objects

RENEW_S, OLD_S = 20.0, 90.0


@contextmanager
def hold_lease(objects: Objects, url: str, where: str) -> Iterator[None]:
    """Hold the object at `url` for this process; `OutputError` while another one does, calling the output `where`."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    data = json.dumps(own).encode()
    if not objects.put(url, data, absent=True):
        _check_abandoned(objects, url, where)
        objects.put(url, data)
    stop = threading.Event()
    keeper = threading.Thread(target=_renew, args=(objects, url, data, stop), name="mergemill-lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if objects.get(url) == data:
            objects.delete([url])


def _check_abandoned(objects: Objects, url: str, where: str) -> None:
    """Raise `OutputError` unless who holds the lease is gone."""
    age_s = objects.get_age(url)
    if age_s is None or age_s > OLD_S:
        return
    holder = _parse(objects.get(url))
    if holder.get("host") == socket.gethostname() and not _runs(holder.get("pid")):
        return
    raise OutputError(
        f"{where}: another mergemill is writing here (process {holder.get('pid')} of {holder.get('host')}, seen "
        f"{age_s:.0f} s ago); wait for it or stop it; one that was killed is forgotten after {OLD_S:.0f} s"
    )


def _renew(objects: Objects, url: str, data: bytes, stop: threading.Event) -> None:
    while not stop.wait(RENEW_S):
        try:
            objects.put(url, data)
        except StorageError:
            continue  # the merge itself will say what is wrong with the storage


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _runs(process: object) -> bool:
    if not isinstance(process, int):
        return True
    if process == os.getpid():
        return False  # of this process, whose own lease would still be held
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Requests to storage that are made again where that may help, and how many were made again in this process.

A loop of our own (2026-11-29): tenacity would be one more dependency for these few lines, and its statistics are of one
loop; here all of a process are counted, those of botocore too.
"""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mergemill.engine.errors import StorageError
from mergemill.engine.storage.store import Unavailable

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0  # before trying again: at random up to twice the first, which doubles


@dataclass(frozen=True, slots=True)
class Patience:
    """How often something is tried."""

    attempts: int
    enough_s: float = math.inf  # after which there are no more


BEFORE = Patience(4, 15.0)  # with what is asked before the merge: most likely the place is wrong
DURING = Patience(8)  # with what a merge needs: hours of work may wait for it


def ask_patiently(ask: Callable[[], T], patience: Patience) -> T:
    """Return what `ask` returns at one of several attempts; raise the last one's `Unavailable`."""
    began_s = time.monotonic()
    attempt = 1
    while True:
        try:
            return ask()
        except Unavailable:
            if attempt == patience.attempts or time.monotonic() - began_s > patience.enough_s:
                raise
        note_retry()
        time.sleep(random.uniform(0, min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)))
        attempt += 1


def insist(ask: Callable[[], T], doing: str) -> T:
    """Return what `ask` returns at one of the attempts of a merge; `StorageError` after the last."""
    try:
        return ask_patiently(ask, DURING)
    except Unavailable as error:
        raise StorageError(f"{doing} failed {DURING.attempts} times, at last with: {error}") from error


class _Count:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self) -> None:
        with self._lock:
            self.value += 1


_RETRIES = _Count()


def note_retry() -> None:
    """Note that a request failed and is made once more."""
    _RETRIES.add()


def count_retries() -> int:
    """Return how many there were since the process began."""
    return _RETRIES.value

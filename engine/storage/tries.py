"""How many requests to storage were made again in this process, whoever made them again."""

import threading


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

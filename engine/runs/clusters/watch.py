"""Watching a cluster while its tasks run: whether its scheduler is there, answers, still knows them, and has workers.

A connection that breaks is noticed at once, one that is cut after the time that Dask gives it (30 s). A scheduler that
is frozen breaks nothing, and tasks without a worker would wait for ever: hence the looks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.tasks.failures import RESUME

LOOK_S = 5.0  # between two looks
ANSWER_S = 60.0  # for the scheduler to answer one
ALONE_S = 300.0  # without any worker, before the run ends
TELL_S = 60.0  # between two words about workers that do not come
DONE_IS_KEPT = f"the parts that are done are kept: {RESUME}"


class SchedulerLost(Exception):
    """The scheduler is gone, does not answer, or has begun anew and knows nothing of our tasks."""


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Take an error of the connection, of which a timeout is one, for the loss of the scheduler."""
    try:
        yield
    except OSError as error:
        raise SchedulerLost(str(error)) from error


@contextmanager
def explaining_loss(where: str) -> Iterator[None]:
    """Let a scheduler that is lost before the tasks run, say what was lost and how to go on."""
    try:
        yield
    except SchedulerLost as error:
        raise ClusterError(f"{where}: the scheduler is lost ({error}); {DONE_IS_KEPT}") from error


class ClusterWatch:
    """Looks at the cluster of a client of `distributed` now and then; `where` is what its user calls it.

    alone_s: how long it may be without a worker. hint: what is said of that. tell_alone: called now and then, with the
    seconds, while it is.
    """

    def __init__(
        self, client: Any, where: str, *, alone_s: float, hint: str, tell_alone: Callable[[float], None]
    ) -> None:
        self._client = client
        self._where = where
        self._alone_s = alone_s
        self._hint = hint
        self._tell_alone = tell_alone
        self._scheduler = ""  # its id; unknown before the first look
        self._next_s = 0.0
        self._alone_since_s: float | None = None
        self._told_s = 0.0  # of being alone

    def look(self, *, now: bool = False) -> bool:
        """Raise `SchedulerLost`, or `ClusterError` where no worker comes any more; False where it is not yet time."""
        if not now and time.monotonic() < self._next_s:
            return False
        found = self._ask()
        if found["id"] != (self._scheduler or found["id"]):
            raise SchedulerLost("another one answers there")
        self._scheduler = found["id"]
        self._count_workers(found["n_workers"])
        self._next_s = time.monotonic() + LOOK_S
        return True

    def _ask(self) -> dict[str, Any]:
        if self._client.status != "running":
            raise SchedulerLost(f"the client is {self._client.status}")
        with noticing_loss():
            found: dict[str, Any] = self._client.sync(
                self._client.scheduler.identity, n_workers=0, callback_timeout=ANSWER_S
            )
        return found

    def _count_workers(self, count: int) -> None:
        if count:
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s, self._told_s = time.monotonic(), 0.0
        elif (alone_s := time.monotonic() - self._alone_since_s) > self._alone_s:
            raise ClusterError(
                f"{self._where}: no worker has been there for {self._alone_s:.0f} s; {self._hint}; {DONE_IS_KEPT}"
            )
        elif alone_s > self._told_s + TELL_S:
            self._tell_alone(round(alone_s, 1))
            self._told_s = alone_s

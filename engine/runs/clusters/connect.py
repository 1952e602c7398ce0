"""Reaching a cluster: a connection that ends in time, and a first worker."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client
from distributed.comm.core import connect
from distributed.security import Security

from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.clusters.encryption import check_certificates, explain_refusal, read_address
from mergemill.engine.runs.clusters.watch import ANSWER_S, DONE_IS_KEPT, TELL_S, SchedulerLost, noticing_loss

CLOSE_S = 5.0  # for the connections of a client to end
CONNECT_S = 10  # for a scheduler to answer
WORKERS_S = 300  # for a first worker to join it: many that start at once from a shared disk take minutes
_LOOK_S = 1.0  # while the first task of a cluster is waited for
REJOIN_S = 60.0  # for a scheduler to answer again that was lost


def open_client(scheduler: str) -> Client:
    """Return a client of the scheduler at an address, or that a file names."""
    check_certificates(scheduler)
    try:
        address = read_address(scheduler)
        with ThreadPoolExecutor(1) as pool:  # this thread may have a running loop, as in a notebook
            pool.submit(asyncio.run, _shake_hands(address)).result()
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(explain_refusal(scheduler, error)) from error


@contextmanager
def opened_client(
    scheduler: str, wait_s: float = 0.0, tell_waiting: Callable[[float], None] = lambda waited_s: None
) -> Iterator[Client]:
    """Open a client of the scheduler at an address, or that a file names, and close it when the block ends.

    wait_s: for one that does not answer yet. tell_waiting: called now and then, with the seconds, while it does not.
    """
    client = _await_client(scheduler, wait_s, tell_waiting)
    try:
        yield client
    finally:
        close_client(client)


def close_client(client: Client) -> None:
    """Close a client, whatever has become of its scheduler."""
    with suppress(OSError, RuntimeError):  # a frozen one takes no farewell; or the client was just connecting again
        client.close(CLOSE_S)


async def _shake_hands(address: str) -> None:
    """Connect once: a client would wait for ever for a scheduler that is frozen, for which the kernel still listens."""
    options = Security().get_connection_args("client")
    try:
        comm = await asyncio.wait_for(connect(address, timeout=CONNECT_S, **options), CONNECT_S + 1)
    except TimeoutError as error:
        raise TimeoutError(f"it is silent for {CONNECT_S} s") from error
    await comm.close()


def open_client_again(scheduler: str, lost: SchedulerLost) -> Client:
    """Return a client of the scheduler that comes after one that is lost."""
    try:
        return _await_client(scheduler, REJOIN_S, lambda waited_s: None)
    except ClusterError as error:
        raise ClusterError(
            f"{scheduler}: the scheduler is lost ({lost}), and none has answered there for {REJOIN_S:.0f} s; "
            f"{DONE_IS_KEPT}"
        ) from error


def _await_client(scheduler: str, wait_s: float, tell_waiting: Callable[[float], None]) -> Client:
    begun_s, next_s = time.monotonic(), 0.0
    check_certificates(scheduler)  # no waiting helps there
    while True:
        try:
            return open_client(scheduler)
        except ClusterError:
            if (waited_s := time.monotonic() - begun_s) >= wait_s:
                raise
        if waited_s >= next_s:
            tell_waiting(round(next_s, 1))
            next_s += TELL_S
        time.sleep(1.0)


def wait_for_workers(
    client: Client, scheduler: str, tell_waiting: Callable[[float], None] = lambda waited_s: None
) -> list[int]:
    """Return the threads of each worker, once one is there; or raise `SchedulerLost`.

    tell_waiting: called with the seconds where none is there, and now and then while none comes.
    """
    begun_s, next_s = time.monotonic(), 0.0
    ask: Any = client.scheduler.identity  # type: ignore[union-attr]
    while True:
        with noticing_loss():
            found = client.sync(ask, n_workers=-1, callback_timeout=ANSWER_S)["workers"]
        if found:
            return [info["nthreads"] for info in found.values()]
        waited_s = time.monotonic() - begun_s
        if waited_s > WORKERS_S:
            raise ClusterError(
                f"{scheduler}: no worker has joined this scheduler in {WORKERS_S} s; start some; {DONE_IS_KEPT}"
            )
        if waited_s >= next_s:
            tell_waiting(round(next_s, 1))
            next_s += TELL_S
        time.sleep(0.1)


def wait_for_first(client: Any, check_going: Callable[[], None], tell: Callable[[float], None]) -> None:
    """Return once a worker has done something: a cluster that scales by its work starts one for that.

    check_going: raises where nobody waits any more; called now and then. tell: called each time that so much more time
    has passed that something may be wrong, with the seconds. Raises `SchedulerLost`.
    """
    first, begun_s, told_s = client.submit(int, pure=False), time.monotonic(), 0.0
    while True:
        check_going()
        try:
            first.result(timeout=_LOOK_S)
            return
        except TimeoutError:
            pass
        except CancelledError as error:
            raise SchedulerLost("the connection broke") from error
        if (waited_s := time.monotonic() - begun_s) > told_s + TELL_S:
            tell(round(waited_s, 1))
            told_s = waited_s

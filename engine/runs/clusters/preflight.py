"""Before a merge on a cluster: whether every worker has the same packages, sees the same files, and has room."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.clusters import probe
from mergemill.engine.runs.clusters.reach import find_unreached
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage.pin import Pin

PROCESS_BYTES = 384 << 20  # Python, Dask, torch (then 248 MiB), boto3 and the Hub's package (298 MiB), and room
CONTEXT_BYTES = 2 << 30  # what a device's libraries and context may take of the host: guessed, not measured
SPARE_BYTES = 1 << 30  # beside the promise, for workers that we start
LEAST_PROMISE_BYTES = 64 << 20  # that is worth to be proposed
PAUSE = 0.9  # share of its limit at which Dask stops giving tasks to a worker that we start
DASK_PAUSE = 0.8  # the same by Dask's own settings
ANSWER_S = 60.0  # for a worker to answer
MOST_ROWS = 20  # of the table in an error
_MOST_TTL_S = 300  # Dask's own; without a sign of life of a worker
_LEAST_FAILURES = 3  # of a worker, before Dask gives up a task that was on it
_AS_SOURCE = threading.RLock()  # what is pickled by value is the process's, and not a merge's


@dataclass(frozen=True, slots=True)
class Needs:
    """What a merge needs of every worker."""

    files: Mapping[str, int] = field(default_factory=dict)  # that it must see: sizes in bytes, by absolute path
    samples: tuple[Pin, ...] = ()  # of remote storage that it must be able to read
    out: str = ""  # remote storage that it must be able to list


def check_workers(client: Any, workers: Workers, needs: Needs, *, all_answer: bool = True) -> None:
    """Raise `ClusterError`, with a table, where a worker lacks what this process has, or what the merge needs.

    client: of `distributed`. all_answer: whether one that does not answer is wrong. Storage is asked only when all
    have the same mergemill, which does that.
    """
    here = probe.look_around({})
    with as_source():
        found = _ask(client, all_answer, probe.look_around, dict(needs.files), workers.device)
    rows = [
        (address, *row)
        for address, there in sorted(found.items())
        for row in _compare(here["versions"], there, workers.memory_bytes)
    ]
    if not rows and (needs.samples or needs.out):
        reached = _ask(client, all_answer, find_unreached, needs.samples, needs.out, workers.storage)
        rows = [(address, *row) for address, faults in sorted(reached.items()) for row in _list_faults(faults)]
    if rows:
        raise ClusterError(f"the cluster's workers cannot do this merge:\n{_format_table(rows)}")


def _ask(client: Any, all_answer: bool, function: Callable[..., Any], *args: object) -> dict[str, Any]:
    """Return what each worker answers, or its error; what has left the cluster meanwhile is no worker."""
    found = ask_workers(client, function, *args)
    silent = {address for address, there in found.items() if isinstance(there, BaseException)}
    if silent and all_answer:
        silent -= set(_list_workers(client))
    return {address: there for address, there in found.items() if address not in silent}


def ask_workers(client: Any, function: Callable[..., Any], *args: object) -> dict[str, Any]:
    """Return what the function returns on each worker, by address, or its error: a timeout where it is frozen."""
    addresses = _list_workers(client)

    async def ask(address: str) -> Any:
        asked = client.run(function, *args, workers=[address], on_error="return")
        try:
            return (await asyncio.wait_for(asked, ANSWER_S))[address]
        except TimeoutError:
            return TimeoutError(f"it is silent for {ANSWER_S:.0f} s")

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*map(ask, addresses))

    return dict(zip(addresses, client.sync(ask_all), strict=True))


def _list_workers(client: Any) -> list[str]:
    """Ask the scheduler itself: what the client knows is empty where it has lost its scheduler."""
    return list(client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER_S)["workers"])


def make_limit(memory_bytes: int, device: str = "cpu") -> int:
    """Return the limit of memory, in bytes, for workers that are promised `memory_bytes` and that we start."""
    memory_bytes += 0 if device == "cpu" else CONTEXT_BYTES
    return max(memory_bytes + SPARE_BYTES, _find_least(memory_bytes, PAUSE))


def _find_least(memory_bytes: int, share: float) -> int:
    """Return the least limit of which a share has room for what is promised, and for the process itself."""
    return math.ceil((memory_bytes + PROCESS_BYTES) / share)


def check_settings(client: Any) -> tuple[str, ...]:
    """Return warnings about settings of the scheduler that make a merge slow or give it up early."""
    with as_source():
        settings = client.run_on_scheduler(probe.read_settings)
    warnings = []
    if settings["worker-saturation"] > 1.1:
        warnings.append(
            f"the scheduler has worker-saturation {settings['worker-saturation']:g}: workers are given tasks that wait "
            "for memory; set distributed.scheduler.worker-saturation to 1.0 where it is started"
        )
    if settings["allowed-failures"] < _LEAST_FAILURES:
        warnings.append(
            f"the scheduler has allowed-failures {settings['allowed-failures']:g}: few lost workers end the merge; set "
            "distributed.scheduler.allowed-failures to 5 where it is started"
        )
    if settings["worker-ttl"] > _MOST_TTL_S:
        said = f"{settings['worker-ttl']:g} s" if settings["worker-ttl"] < math.inf else "off"
        warnings.append(
            f"the scheduler has worker-ttl {said}: a worker that freezes keeps its parts for long, or for ever; set "
            "distributed.scheduler.worker-ttl to 30s where it is started"
        )
    return tuple(warnings)


def _list_faults(faults: Mapping[str, str] | BaseException) -> Iterator[tuple[str, str]]:
    """Yield what of remote storage a worker does not reach, and what would be right."""
    if isinstance(faults, BaseException):
        yield f"{type(faults).__name__}: {faults}", "a worker that answers"
        return
    for fault in faults.values():
        yield fault, "packages and credentials as here: workers find their own"


def _compare(
    here: Mapping[str, str | None], there: Mapping[str, Any] | BaseException, memory_bytes: int
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with one worker, and what would be right."""
    if isinstance(there, BaseException):
        yield f"{type(there).__name__}: {there}", "a worker that answers"
        return
    for name, version in here.items():
        if there["versions"][name] != version:
            yield f"{name} {there['versions'][name] or 'is not installed'}", f"{name} {version}, as here"
    if there["device"]:
        yield there["device"], "a worker with such a device, or --device cpu"
    for path, fault in there["faults"].items():
        yield f"{path}: {fault}", f"a path that {there['host']} sees as this machine does"
    room_bytes = there["limit_bytes"] - PROCESS_BYTES
    if there["limit_bytes"] and room_bytes < memory_bytes:
        smaller = f"--memory {room_bytes >> 20}MiB, or " if room_bytes >= LEAST_PROMISE_BYTES else ""
        yield (
            f"Dask stops it at {there['limit_bytes'] >> 20} MiB, {memory_bytes >> 20} MiB are promised",
            f"{smaller}a memory limit of {_find_least(memory_bytes, DASK_PAUSE) >> 20} MiB, with Python's own",
        )


def _format_table(rows: list[tuple[str, str, str]]) -> str:
    shown = [("worker", "found", "would be right"), *rows[:MOST_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in shown]
    more = len(rows) - MOST_ROWS
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


@contextmanager
def as_source() -> Iterator[None]:
    """Have the probe's functions pickled whole, not by name; one merge of this process after the other."""
    import cloudpickle

    with _AS_SOURCE:
        cloudpickle.register_pickle_by_value(probe)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(probe)

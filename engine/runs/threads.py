"""Threads of this process as workers, by Dask's own threaded scheduler: nothing to start, and no port is opened."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, NoReturn

from dask.delayed import Delayed
from dask.threaded import get

from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.tasks.failures import explain_failure
from mergemill.engine.runs.worker.accelerator import open_device
from mergemill.engine.runs.worker.process import set_up_process
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.cache import open_cache

_HERE = threading.local()  # of a thread of a crew: its workplace


class Threads:
    """A crew of threads."""

    dashboard = ""
    warnings: tuple[str, ...] = ()

    def __init__(self, pool: ThreadPoolExecutor, workers: Workers, workplace: Workplace) -> None:
        self._pool = pool
        self.workers = workers
        self._workplace = workplace

    def check_needs(self, needs: Needs) -> None:
        """They are this process."""

    def stop(self) -> None:
        """Let all tasks end at their next slab."""
        self._workplace.stopping = True

    def run_tasks(self, tasks: Sequence[Delayed], each: Callable[[Any], None]) -> None:
        """Run tasks, and call `each` in this thread with each result as it comes; the first error ends the run."""
        keys = [task.key for task in tasks]
        wanted = frozenset(keys)

        def take(key: str, result: Any, *state: Any) -> None:
            if key in wanted:  # and no statistics that other tasks add up
                each(result)

        get(
            _make_graph(tasks), keys, pool=self._pool, callbacks=[(None, None, None, take, None)], raise_exception=_fail
        )


@contextmanager
def open_threads(workers: Workers) -> Iterator[Threads]:
    """Start threads of this process; when the block ends, so do tasks that still run, at their next slab."""
    device = open_device(workers.device, workers.device_memory_bytes, workers.threads)
    workplace = Workplace(
        workers.memory_bytes, workers.threads, open_cache(workers.cache), storage=workers.storage, device=device
    )
    limited = device.limited() if device else nullcontext()
    with limited, set_up_process(), ThreadPoolExecutor(workers.threads, "mergemill", _enter, (workplace,)) as pool:
        try:
            yield Threads(pool, workers, workplace)
        finally:
            workplace.stopping = True


def find_workplace() -> Workplace | None:
    """Return the workplace of this thread; None where it is of no crew of threads."""
    found: Workplace | None = getattr(_HERE, "workplace", None)
    return found


def _make_graph(tasks: Sequence[Delayed]) -> dict[str, Any]:
    """Return the tasks and what they depend on, each looked at once: all may depend on a round over all parts."""
    graph: dict[str, Any] = {}
    seen: set[str] = set()
    for task in tasks:
        names = list(task.__dask_layers__())
        while names:
            if (name := names.pop()) not in seen:
                seen.add(name)
                graph.update(task.dask.layers[name])
                names += task.dask.dependencies[name]
    return graph


def _enter(workplace: Workplace) -> None:
    _HERE.workplace = workplace


def _fail(error: BaseException, trace: TracebackType) -> NoReturn:
    failure = explain_failure(error, trace)
    raise failure from (error.__cause__ if failure is error else error)

"""What a worker process has done, as Prometheus metrics beside Dask's own, where `prometheus_client` is installed.

Dask's worker serves the process's registry at ``/metrics`` of its dashboard's port. Counters go on over the runs of a
process; nothing is counted that is not counted anyway, a few numbers a task.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage.tries import count_retries


class _Meter:
    """The counts of all runs of this process, of which those that go on still count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Workplace] = []
        self._past = Counts()
        self._registered = False

    def open(self, workplace: Workplace, registry: Any) -> None:
        with self._lock:
            self._open.append(workplace)
            if not self._registered:
                registry.register(self)
                self._registered = True

    def close(self, workplace: Workplace) -> None:
        with self._lock:
            self._open.remove(workplace)
            self._past = self._past.plus(workplace.counts)

    def describe(self) -> list[Any]:
        """Without this the registry would collect once to know the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as they are now; called by the registry."""
        with self._lock:
            places, counts = list(self._open), self._past
        for place in places:
            counts = counts.plus(place.counts)
        yield _counter(
            "read_bytes", "Bytes that tasks read from the sources, second reads included.", counts.read_bytes
        )
        yield _counter("written_bytes", "Bytes of finished parts of outputs.", counts.written_bytes)
        yield _counter("parts", "Parts of outputs that were finished.", counts.parts)
        yield _counter("gate_waiting_seconds", "What tasks waited for memory, in sum.", counts.waited_s)
        yield _counter("retries", "Requests to storage that failed and were tried again.", count_retries())
        yield _gauge("gate_waiting", "Tasks that wait for memory now.", sum(place.waiting for place in places))
        yield _gauge("memory_lent_bytes", "Memory that tasks hold now.", sum(place.lent_bytes for place in places))
        promised_bytes = sum(place.memory_bytes for place in places)
        yield _gauge("memory_promised_bytes", "Memory that the merges of now were promised.", promised_bytes)


def _counter(name: str, text: str, value: float) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"mergemill_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"mergemill_{name}", text, value=value)


_METER = _Meter()


@contextmanager
def metered(workplace: Workplace) -> Iterator[None]:
    """Show in this process's metrics, where there are any, what is done at `workplace`."""
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        yield
        return
    _METER.open(workplace, REGISTRY)
    try:
        yield
    finally:
        _METER.close(workplace)

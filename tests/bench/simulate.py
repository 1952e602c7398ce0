"""A merge on any number of workers, as a discrete simulation: tasks, one scheduler, workers, a store.

The model: the scheduler hands out one task after the other and takes `scheduler_s` for each; workers hold one task at a
time, and wait for the next for the scheduler's time and one message. A task reads, computes and writes, one after the
other. A request takes `latency_s` before its first byte, a worker keeps so many in flight; bytes come at the worker's
bandwidth, and all workers together get no more than the store's. Starting workers,
planning and the commit are not in it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

REQUEST_BYTES = 8 << 20  # of one request
IN_FLIGHT = 16  # requests of one worker at once
READ, WRITE, DONE = 0, 1, 2  # steps of a task
FAR = 0.8  # an efficiency under which growth is called at its end


@dataclass(frozen=True)
class Task:
    """One task of the graph; the graph's tasks are in the order in which they are to be begun."""

    key: str
    needs: tuple[str, ...]  # keys of tasks whose results it takes
    compute_s: float
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class Place:
    """Where a merge runs."""

    scheduler_s: float  # of the scheduler for one task
    message_s: float  # from one process to another
    latency_s: float  # of a request until its first byte
    worker_rate: float  # bytes a second that one worker can read or write
    store_rate: float  # bytes a second that the store gives and takes, all workers together


@dataclass(frozen=True)
class Outcome:
    """How long a merge takes on some workers, and what holds it up."""

    workers: int
    seconds: float
    bounds: dict[str, float]  # seconds that it cannot fall below, by the reason

    @property
    def reason(self) -> str:
        """The largest of the bounds."""
        return max(self.bounds, key=lambda name: self.bounds[name])


def simulate(tasks: Sequence[Task], workers: int, place: Place) -> Outcome:
    """Run the graph on `workers` workers of one thread."""
    order = {task.key: i for i, task in enumerate(tasks)}
    missing = [len(task.needs) for task in tasks]
    wanted = defaultdict(list)
    for task in tasks:
        for key in task.needs:
            wanted[key].append(order[task.key])
    ready = [i for i, count in enumerate(missing) if count == 0]
    events: list[tuple[float, int, int]] = []  # when, which step begins, of which task
    idle = workers
    now = scheduler_free = store_free = 0.0
    while ready or events:
        while ready and idle:
            idle -= 1
            scheduler_free = max(now, scheduler_free) + place.scheduler_s
            heapq.heappush(events, (scheduler_free + place.message_s, READ, heapq.heappop(ready)))
        now, step, number = heapq.heappop(events)
        task = tasks[number]
        if step == READ:
            end, store_free = move(task.read_bytes, now, store_free, place)
            heapq.heappush(events, (end + task.compute_s, WRITE, number))
        elif step == WRITE:
            end, store_free = move(task.write_bytes, now, store_free, place)
            heapq.heappush(events, (end + place.message_s, DONE, number))
        else:
            idle += 1
            for i in wanted[task.key]:
                missing[i] -= 1
                if missing[i] == 0:
                    heapq.heappush(ready, i)
    return Outcome(workers, now, find_bounds(tasks, workers, place))


def move(size: int, now: float, store_free: float, place: Place) -> tuple[float, float]:
    """Return when `size` bytes have come or gone that are asked for now, and when the store is free again.

    The store serves in the order in which it is asked.
    """
    if size == 0:
        return now, store_free
    store_free = max(store_free, now) + size / place.store_rate
    return max(now + alone_s(size, place), store_free), store_free


def alone_s(size: int, place: Place) -> float:
    """Return the seconds that bytes take of a worker that has the store to itself."""
    waves = math.ceil(math.ceil(size / REQUEST_BYTES) / IN_FLIGHT)
    return waves * place.latency_s + size / place.worker_rate


def find_bounds(tasks: Sequence[Task], workers: int, place: Place) -> dict[str, float]:
    """Return by reason the seconds that no schedule can fall below."""
    lengths = {task.key: hold_s(task, place) for task in tasks}
    chains: dict[str, float] = {}
    for task in tasks:  # what a task needs stands before it
        chains[task.key] = lengths[task.key] + max((chains[key] for key in task.needs), default=0.0)
    return {
        "the work": sum(lengths.values()) / workers,
        "the longest chain of tasks": max(chains.values(), default=0.0),
        "the scheduler": len(tasks) * place.scheduler_s,
        "the store": sum(task.read_bytes + task.write_bytes for task in tasks) / place.store_rate,
    }


def hold_s(task: Task, place: Place) -> float:
    """Return the seconds that a task holds a worker that has the store to itself."""
    moved_s = sum(alone_s(size, place) for size in (task.read_bytes, task.write_bytes) if size)
    return place.scheduler_s + 2 * place.message_s + moved_s + task.compute_s


def find_end(outcomes: Sequence[Outcome]) -> str:
    """Say from how many workers on a merge no longer gains, and why."""
    first = outcomes[0]
    for outcome in outcomes:
        efficiency = first.seconds * first.workers / outcome.seconds / outcome.workers
        if efficiency < FAR:
            held = outcome.reason
            why = "uneven shares: the last tasks leave workers idle" if held == "the work" else held
            return f"linear up to fewer than {outcome.workers} workers; there held up by {why} ({efficiency:.0%})"
    return f"linear up to {outcomes[-1].workers} workers (efficiency at least {FAR:.0%})"

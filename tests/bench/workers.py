"""Cost against workers: real processes on this machine, and a simulation that is driven by what they measured."""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from costs import take_time
from dask.delayed import Delayed, delayed
from distributed import get_task_stream
from simulate import Place, Task

from mergemill.engine.plan.values import Part, Piece, Plan
from mergemill.engine.runs.clusters.cluster import Cluster, open_cluster
from mergemill.engine.runs.graph import make_tasks
from mergemill.engine.runs.outputs.output import open_output
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.tensors.slabs import Span

TRIVIAL_TASKS = 1000
_MERGE = re.compile(r"merge-(?P<number>\d+)-\w+")
_GATHER = re.compile(r"gather-(?P<name>.+)-round\d+-\w+-(?P<number>\d+)")


@dataclass(frozen=True)
class Rates:
    """Seconds that tasks take of a worker, reading from a warm page cache."""

    whole: float  # for a byte read, of a part whose tensors need nothing from other parts
    cut: float  # of a part of tensors whose statistics came from tasks before
    gather: float  # of a task for such statistics
    total_s: float  # of a task that adds up statistics


@dataclass(frozen=True)
class Overhead:
    """What a task costs that does nothing."""

    scheduler_s: float  # CPU seconds of the scheduler's and the client's process
    worker_s: float  # CPU seconds of the worker's
    wall_s: float  # with one worker, until the next


def measure_overhead(memory_bytes: int) -> Overhead:
    """Run tasks that do nothing on one worker process."""
    with open_cluster(Workers(1, 1, memory_bytes)) as cluster:
        pids = cluster.client.run(_take_cpu_s)
        tasks = [_do_nothing(dask_key_name=f"nothing-{i:06d}") for i in range(TRIVIAL_TASKS)]
        before = take_time()
        cluster.run_tasks(tasks, lambda result: None)
        spent = take_time() - before
        worker_s = sum(cluster.client.run(_take_cpu_s).values()) - sum(pids.values())
    return Overhead(spent.cpu_s / TRIVIAL_TASKS, worker_s / TRIVIAL_TASKS, spent.wall_s / TRIVIAL_TASKS)


@delayed(pure=False)
def _do_nothing() -> None:
    pass


def _take_cpu_s() -> float:
    return take_time().cpu_s


def measure_rates(plan: Plan, out: Path, memory_bytes: int) -> Rates:
    """Run the tasks of a plan on one worker process, and return what each kind took there."""
    output = open_output(out, plan)
    output.start(plan)
    tasks = make_tasks(plan, plan.parts, output.targets(plan))
    with open_cluster(Workers(1, 1, memory_bytes)) as cluster:
        took_s = _time_tasks(cluster, tasks)
    sizes = {task.key: task.read_bytes for task in list_tasks(plan, tasks, None)}
    kinds = {key: name_kind(key, plan) for key in sizes}
    by_kind: dict[str, list[float]] = {}
    for key, seconds in took_s.items():
        by_kind.setdefault(kinds[key], []).append(seconds / (sizes[key] or 1))
    medians = Counter({kind: statistics.median(found) for kind, found in by_kind.items()})
    return Rates(medians["whole"], medians["cut"], medians["gather"], medians["total"])


def _time_tasks(cluster: Cluster, tasks: Sequence[Delayed]) -> dict[str, float]:
    """Return by key the seconds that a task ran on its worker."""
    with get_task_stream(cluster.client) as stream:
        cluster.run_tasks(tasks, lambda result: None)
    return {
        entry["key"]: sum(each["stop"] - each["start"] for each in entry["startstops"] if each["action"] == "compute")
        for entry in stream.data
    }


def list_tasks(plan: Plan, tasks: Sequence[Delayed], rates: Rates | None) -> list[Task]:
    """Return the graph that runs a plan, each task after those that it needs; without rates computing takes no time."""
    needs = read_needs(tasks)
    pieces = list_cut_pieces(plan)
    found: dict[str, Task] = {}
    for task in tasks:
        for key in iter_before(task.key, needs, found):
            found[key] = _make_task(key, needs[key], plan, pieces, rates)
    return list(found.values())


def iter_before(key: str, needs: Mapping[str, Sequence[str]], done: Mapping[str, Task]) -> Iterator[str]:
    """Yield a task after everything that it needs and that is not `done`."""
    waiting = [key]
    while waiting:
        left = [need for need in needs[waiting[-1]] if need not in done]
        if left:
            waiting.extend(reversed(left))
        elif (ready := waiting.pop()) not in done:
            yield ready


def read_needs(tasks: Sequence[Delayed]) -> dict[str, tuple[str, ...]]:
    """Return for every task of the graph the keys of those that it needs."""
    needs: dict[str, tuple[str, ...]] = {}
    for task in tasks:
        layers = task.dask.layers
        for name in layers.keys() - needs.keys():
            needs |= {key: tuple(layer.dependencies) for key, layer in layers[name].items()}
    return needs


def list_cut_pieces(plan: Plan) -> dict[str, list[Piece]]:
    """Return the pieces of the tensors whose statistics need several tasks, by the tensor."""
    pieces: dict[str, list[Piece]] = {}
    for part in plan.parts:
        for piece in part.pieces:
            if is_cut(piece):
                pieces.setdefault(piece.tensor.name, []).append(piece)
    return pieces


def is_cut(piece: Piece) -> bool:
    """Whether tasks before must gather statistics for a piece."""
    return not piece.whole and piece.projected.most_rounds > 0


def name_kind(key: str, plan: Plan) -> str:
    """Return what a task is: ``whole``, ``cut``, ``gather`` or ``total``."""
    if found := _MERGE.fullmatch(key):
        return "cut" if any(map(is_cut, plan.parts[int(found["number"])].pieces)) else "whole"
    return "gather" if _GATHER.fullmatch(key) else "total"


def _make_task(
    key: str, needs: tuple[str, ...], plan: Plan, pieces: Mapping[str, Sequence[Piece]], rates: Rates | None
) -> Task:
    if found := _MERGE.fullmatch(key):
        part = plan.parts[int(found["number"])]
        compute_s = 0.0 if rates is None else _merge_s(part, rates)
        return Task(key, needs, compute_s, sum(map(count_read_bytes, part.pieces)), part.size_bytes)
    if found := _GATHER.fullmatch(key):
        read_bytes = count_read_bytes(pieces[found["name"]][int(found["number"])])
        return Task(key, needs, 0.0 if rates is None else rates.gather * read_bytes, read_bytes, 0)
    return Task(key, needs, 0.0 if rates is None else rates.total_s, 0, 0)


def _merge_s(part: Part, rates: Rates) -> float:
    return sum((rates.cut if is_cut(piece) else rates.whole) * count_read_bytes(piece) for piece in part.pieces)


def count_read_bytes(piece: Piece) -> int:
    """Return the bytes that one reading of a piece's inputs takes."""
    return sum(read.size_bytes for read in piece.tensor.expression.reads(Span(piece.span.start, piece.span.stop)))


def describe_place(place: Place) -> str:
    """Say in words where a simulated merge runs."""
    return (
        f"scheduler {place.scheduler_s * 1e3:.2f} ms a task, {place.message_s * 1e3:.1f} ms a message, "
        f"{place.latency_s * 1e3:.0f} ms a request, {place.worker_rate / 1e6:,.0f} MB/s a worker, "
        f"{place.store_rate / 1e9:,.0f} GB/s the store"
    )

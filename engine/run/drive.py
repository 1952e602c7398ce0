"""Running a plan: from an empty or resumed output folder, over the Dask tasks, to the commit."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dask.delayed import Delayed
from distributed import Client, as_completed

from mergemill.engine.errors import MergemillError, RunError
from mergemill.engine.methods.own import find_own_line
from mergemill.engine.plan.memory import check_memory
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.run.cluster import Workers, open_cluster
from mergemill.engine.run.events import Committed, OnEvent, PartFinished, Started, ignore
from mergemill.engine.run.graph import make_checks, make_tasks
from mergemill.engine.run.guard import Report, check_report, make_report
from mergemill.engine.run.output import Output, check_same, commit_output, find_shard, open_output, start_output
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.storage.ranges import check_pin
from mergemill.engine.tensors.slabs import SLAB

MEMORY = "1GiB"
SMALL_BYTES = 4 << 30  # merges that write less than this run as threads of this process


def choose_workers(
    plan: Plan, *, workers: int | None = None, threads: int | None = None, memory: str | int = MEMORY
) -> Workers:
    """Return the workers of a local cluster.

    workers: processes; 0 means threads of this process; None chooses, by the size of the merge. threads: of each
    worker; None is one a process, or as many as there are cores. memory: promised to each worker.
    """
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = 0 if threads is not None or plan.write_bytes < SMALL_BYTES or cores == 1 else cores
    return Workers(workers, threads or (1 if workers else cores), parse_size(memory, what="--memory"))


def run(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int | None = None,
    memory: str | int = MEMORY,
    on_event: OnEvent = ignore,
    slab: int = SLAB,
) -> Committed:
    """Run `plan` into the folder `out`, which is new, empty, or holds the same merge unfinished.

    An unfinished merge is resumed: only parts without a receipt are merged, the others are checked. `on_event` is
    called in this thread. Raises `OutputError` before anything is written where `out` holds something else, and
    `RunError` for what goes wrong later; the run can then be repeated.
    """
    started = time.perf_counter()
    chosen = choose_workers(plan, workers=workers, threads=threads, memory=memory)
    check_memory(plan.parts, chosen.memory_bytes)
    output = open_output(Path(out), plan)
    with output.locked():
        check_same(output, plan)  # again: another driver may just have been here
        if output.journal.is_committed():
            return _finish_again(output, plan, on_event)
        for pin in plan.pins:
            check_pin(pin)
        receipts = start_output(output, plan)
        redone, read_bytes = _run_parts(plan, output, receipts, chosen, on_event, slab)
        report = _read_report(output, plan)
        check_report(report, plan.guard.policy, str(out))
        commit_output(output, plan)
        seconds = time.perf_counter() - started
        committed = Committed(
            str(out), plan.digest, len(plan.parts), redone, plan.write_bytes, read_bytes, round(seconds, 3), report
        )
    on_event(committed)
    return committed


def _finish_again(output: Output, plan: Plan, on_event: OnEvent) -> Committed:
    """The same merge is here already: say so, unless something of it is gone."""
    for name in [shard.name for shard in plan.shards] + [file.name for file in plan.files]:
        if not (output.folder / name).exists():
            raise RunError(f"{output.folder}: was finished, but {name} is gone; remove the folder and merge again")
    report = _read_report(output, plan)
    committed = Committed(str(output.folder), plan.digest, len(plan.parts), 0, plan.write_bytes, 0, 0.0, report)
    on_event(committed)
    return committed


def _read_report(output: Output, plan: Plan) -> Report:
    """Sum up what the guard saw, from the last receipt of each part."""
    return make_report(plan, {receipt.part: receipt for receipt in output.journal.read()}.values())


def _run_parts(
    plan: Plan, output: Output, receipts: Mapping[int, Receipt], workers: Workers, on_event: OnEvent, slab: int
) -> tuple[int, int]:
    """Run all parts and journal their receipts; returns how many were merged and what was read for them."""
    if not plan.parts:
        return 0, 0
    paths = [find_shard(output, shard.name, plan.digest) for shard in plan.shards]
    done = merged = done_bytes = read_bytes = 0
    with open_cluster(workers) as client:
        on_event(_describe_start(plan, output, receipts, workers, client))
        for receipt, kept in _iter_parts(client, plan, paths, receipts, slab):
            done += 1
            done_bytes += receipt.stop_bytes - receipt.start_bytes
            if not kept:
                merged += 1
                read_bytes += receipt.read_bytes
                output.journal.append(receipt)
            on_event(PartFinished(receipt, kept, done, done_bytes, read_bytes))
    return merged, read_bytes


def _describe_start(
    plan: Plan, output: Output, receipts: Mapping[int, Receipt], workers: Workers, client: Client
) -> Started:
    return Started(
        out=str(output.folder),
        digest=plan.digest,
        workers=workers.count,
        threads=workers.threads,
        memory_bytes=workers.memory_bytes,
        dashboard=client.dashboard_link,
        parts=len(plan.parts),
        resumed_parts=len(receipts),
        write_bytes=sum(part.size_bytes for part in plan.parts),
    )


def _iter_parts(
    client: Client, plan: Plan, paths: Sequence[Path], receipts: Mapping[int, Receipt], slab: int
) -> Iterator[tuple[Receipt, bool]]:
    """Yield each part's receipt, and whether it is of an earlier run: what is kept needs no statistics any more."""
    left = {part.number: part for part in plan.parts}
    for receipt, good in _iter_results(client, make_checks(plan, paths, receipts)):
        if good:
            del left[receipt.part]
            yield receipt, True
    for receipt in _iter_results(client, make_tasks(plan, list(left.values()), paths, slab)):
        yield receipt, False


def _iter_results(client: Client, tasks: Sequence[Delayed]) -> Iterator[Any]:
    """Yield results as they come, letting each go at once; the first error ends the run."""
    futures = client.compute(list(tasks), optimize_graph=False)
    try:
        for future, result in as_completed(futures, loop=client.loop, with_results=True, raise_errors=False):
            if future.status != "finished":
                failed = future.status == "error"
                raise _explain(*(future.exception(), future.traceback()) if failed else (None, None))
            future.release()
            yield result
    finally:
        client.cancel(futures, force=True)


def _explain(error: BaseException | None, trace: TracebackType | None) -> MergemillError:
    if isinstance(error, MergemillError):
        return error
    if line := find_own_line(trace):
        return RunError(
            f"{line}: {type(error).__name__}: {error}; with another file it is another merge, into another folder"
        )
    kind = type(error).__name__
    return RunError(f"a task failed: {kind}: {error}; run the same command again to resume")

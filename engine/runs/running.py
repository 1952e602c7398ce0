"""Running a plan: from an empty or resumed output folder, over the Dask tasks, to the commit."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mergemill.engine.errors import OutputError, RunError
from mergemill.engine.plan.memory import check_memory
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.caching import choose_cache
from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.clusters.reach import choose_samples
from mergemill.engine.runs.crew import Crew, check_crew, open_crew
from mergemill.engine.runs.driver import Driving, drive
from mergemill.engine.runs.environment import describe_slowness
from mergemill.engine.runs.events import Committed, OnEvent, PartFinished, Started, Waiting
from mergemill.engine.runs.graph import make_checks, make_tasks, needs_gates
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.outputs.gates import add_gates, find_gates_kept, forget_gates, keep_gates
from mergemill.engine.runs.outputs.losses import add_losses
from mergemill.engine.runs.outputs.output import (
    Output,
    check_same,
    commit_output,
    find_output,
    is_replaced,
    open_output,
    start_output,
)
from mergemill.engine.runs.outputs.receipts import Receipt, keep_planned
from mergemill.engine.runs.outputs.record import list_ranges
from mergemill.engine.runs.progress import show_progress
from mergemill.engine.runs.replacing import leaving_whole
from mergemill.engine.runs.tasks.failures import WorkersDied, explain_deaths
from mergemill.engine.runs.tasks.guard import check_report, find_losses, make_report
from mergemill.engine.runs.worker.workers import Workers, choose_workers
from mergemill.engine.storage.ranges import check_pin, is_remote
from mergemill.engine.storage.urls import parse_place


def run(plan: Plan, out: str | Path, **options: Unpack[RunKeywords]) -> Committed:
    """Run `plan` into the folder, prefix or repository `out`, which is new, empty, or holds the same merge unfinished.

    An unfinished merge is resumed: only parts without a receipt are merged, the others are checked. options: of the
    workers, `workers`, `threads`, `memory`, `scheduler`, `wait_s`, `cluster`, `device`, `device_memory`, `cache`,
    `cache_folder`, `storage` and `reader`, see `WorkerOptions`; and `public`, `overwrite`, `progress`, `on_event`,
    `resume` and `slab`, see `RunOptions`. Raises `OutputError` before anything is written where `out` holds something
    else, `ClusterError` where workers cannot do it, `RunError` for what goes wrong later, and `Cancelled` where
    `cancel` asked it to end; the run can then be repeated.
    """
    return run_as(plan, out, RunOptions(**options))


def run_as(plan: Plan, out: str | Path, asked: RunOptions) -> Committed:
    """Run `plan` into `out` as is asked: see `run`."""
    started = time.perf_counter()
    on_event = asked.on_event
    out = parse_place(out, OutputError)
    chosen = choose_workers(plan, asked)
    kept = choose_cache(asked.cache, asked.cache_folder, out, plan.write_bytes, here=chosen.is_here)
    chosen = replace(chosen, cache=kept)
    place = find_output(out, chosen.storage, public=asked.public)
    place.check_workers(chosen, plan)
    check_memory(plan.parts, chosen.memory_bytes, place.beside_bytes)
    if plan.gates is not None:
        plan.gates.check_memory(chosen.memory_bytes)
    check_crew(chosen, _list_needs(plan, out), _make_teller(chosen, on_event), asked.wait_s)
    output = open_output(out, plan, chosen.storage, public=asked.public, overwrite=asked.overwrite)
    with output.locked():
        replaced = asked.overwrite and is_replaced(output, plan)
        if not replaced:
            check_same(output, plan)  # again: another driver may just have been here
            if output.journal.is_committed():
                return _finish_again(output, plan, on_event)
        with (
            leaving_whole(output, replaced=replaced) as old,
            drive(output.notes, asked.resume, replaces=old) as driving,
        ):
            for pin in plan.pins:
                check_pin(pin, chosen.storage)
            with show_progress(on_event, wanted=asked.progress) as tell:
                redone, read_bytes = _run_parts(plan, output, chosen, tell, driving, asked, replaced)
            receipts = _read_receipts(output, plan)
            report, losses = make_report(plan, receipts), find_losses(plan, receipts)
            check_report(report, plan.guard.policy, out)
            whole, routing, told = _add_gates(plan, output) if plan.gates is not None else (plan, None, ())
            whole = add_losses(whole, losses) if losses else whole
            commit_output(output, whole)
            seconds = time.perf_counter() - started
            committed = Committed(
                out,
                plan.digest,
                len(plan.parts),
                redone,
                plan.write_bytes,
                read_bytes,
                round(seconds, 3),
                report,
                (*(_find_warnings(chosen) if redone else ()), *told),
                routing,
                losses or None,
            )
            driving.commit(committed)
            if plan.gates is not None:
                forget_gates(output.notes)
            output.mark_committed()
    on_event(committed)
    return committed


def _add_gates(plan: Plan, output: Output) -> tuple[Plan, dict[str, Any], Sequence[str]]:
    """Return the plan with the file of gates, the routing report, and what is to be known of it."""
    from mergemill.engine.forward.report import warn_of_report  # of mixtures alone
    from mergemill.engine.runs.tasks.gates import read_gates

    data = find_gates_kept(output.notes)
    if data is None:
        raise RunError(f"{output}: the gates were removed while the mixture was made; run the same again to resume")
    _, routing = read_gates(data, f"{output}: gates")
    return add_gates(plan, data, routing), routing, warn_of_report(routing, where=plan.origin.name or "recipe")


def _find_warnings(workers: Workers) -> tuple[str, ...]:
    """Return what was slow on this machine; of the workers of a cluster nothing is known."""
    slowness = "" if workers.scheduler or workers.cluster else describe_slowness()
    return (slowness,) if slowness else ()


def _list_needs(plan: Plan, out: str) -> Needs:
    """Return what workers must see and reach, the output's own files aside."""
    files = {pin.url: pin.size_bytes for pin in plan.pins if not is_remote(pin.url)}
    return Needs(files, choose_samples(plan.pins), out if is_remote(out) else "")


def _finish_again(output: Output, plan: Plan, on_event: OnEvent) -> Committed:
    """The same merge is here already: say so, unless something of it is gone."""
    for name in [shard.name for shard in plan.shards] + [file.name for file in plan.files]:
        if output.find(name) is None:
            raise RunError(f"{output}: was finished, but {name} is gone; merge again with --overwrite")
    receipts = _read_receipts(output, plan)
    report, losses = make_report(plan, receipts), find_losses(plan, receipts) or None
    committed = Committed(str(output), plan.digest, len(plan.parts), 0, plan.write_bytes, 0, 0.0, report, losses=losses)
    on_event(committed)
    return committed


def _read_receipts(output: Output, plan: Plan) -> Sequence[Receipt]:
    """Return the last receipt of each part."""
    return list(keep_planned(output.journal.read(), list_ranges(plan)).values())


def _run_parts(
    plan: Plan,
    output: Output,
    workers: Workers,
    on_event: OnEvent,
    driving: Driving,
    asked: RunOptions,
    replaced: bool,
) -> tuple[int, int]:
    """Run all parts and journal their receipts; returns how many were merged and what was read for them."""
    if not plan.parts:
        if replaced:
            output.clear(plan)
        start_output(output, plan)
        return 0, 0
    token = plan.digest[:12] + secrets.token_hex(4)  # one run's: on a cluster another may merge the same plan
    left = {part.number: part for part in plan.parts}
    tally = _Tally(on_event)

    def keep(checked: tuple[Receipt, bool]) -> None:
        receipt, good = checked
        if good:
            del left[receipt.part]  # and what is kept needs no statistics any more
            tally.finish(receipt, kept=True)

    def journal(done: Sequence[Receipt] | bytes) -> None:
        if isinstance(done, bytes):
            keep_gates(output.notes, done)
            return
        for receipt in done:
            output.journal.append(receipt)
            tally.finish(receipt, kept=False)

    tell_waiting = _make_teller(workers, on_event)
    with open_crew(workers, token, tell_waiting) as crew, driving.stopped_by(crew.stop):
        needs = _list_needs(plan, str(output))
        if workers.cluster:
            tell_waiting(0.0)
            crew.check_needs(needs)
        if replaced:
            output.clear(plan)
        receipts = start_output(output, plan)
        gates = find_gates_kept(output.notes) if plan.gates is not None else None
        if plan.gates is not None and gates is None:  # parts of lost gates would not be those of the kept file
            receipts = {number: each for number, each in receipts.items() if not needs_gates(plan.parts[number])}
        targets = output.targets(plan)
        crew.check_needs(replace(needs, files={**needs.files, **output.files_seen()}))
        begun = _describe_start(plan, output, receipts, crew)
        driving.start(begun, sum(receipt.stop_bytes - receipt.start_bytes for receipt in receipts.values()))
        on_event(begun)
        try:
            crew.run_tasks(make_checks(plan, targets, receipts, token), keep)
            crew.run_tasks(make_tasks(plan, list(left.values()), targets, asked.slab, token, gates), journal)
        except WorkersDied as error:
            raise explain_deaths(error, plan) from error
    return tally.merged, tally.read_bytes


def _make_teller(workers: Workers, on_event: OnEvent) -> Callable[..., None]:
    """Return what tells that a cluster has no worker yet, or what else is missing, and for how many seconds."""
    return lambda waited_s, missing="worker": on_event(Waiting(workers.name, waited_s, missing))


class _Tally:
    """Counts the parts that are there, and tells of each."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._done = self._done_bytes = 0
        self.merged = self.read_bytes = 0  # of parts of this run

    def finish(self, receipt: Receipt, *, kept: bool) -> None:
        """A part is written; `kept` where an earlier run did it."""
        self._done += 1
        self._done_bytes += receipt.stop_bytes - receipt.start_bytes
        if not kept:
            self.merged += 1
            self.read_bytes += receipt.read_bytes
        self._on_event(PartFinished(receipt, kept, self._done, self._done_bytes, self.read_bytes))


def _describe_start(plan: Plan, output: Output, receipts: Mapping[int, Receipt], crew: Crew) -> Started:
    return Started(
        out=str(output),
        digest=plan.digest,
        workers=crew.workers.count,
        threads=crew.workers.threads,
        memory_bytes=crew.workers.memory_bytes,
        dashboard=crew.dashboard,
        parts=len(plan.parts),
        resumed_parts=len(receipts),
        write_bytes=sum(part.size_bytes for part in plan.parts),
        warnings=crew.warnings,
    )

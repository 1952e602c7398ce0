"""A plan in numbers, as JSON values: what it reads and writes, and what it takes of the workers that would run it."""

from dataclasses import asdict
from typing import Any, Unpack

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.memory import check_memory, count_device_tensors, device_need, task_bytes
from mergemill.engine.plan.summary import find_dtypes
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.environment import describe_slowness
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.outputs.output import check_held, find_output, is_replaced
from mergemill.engine.runs.outputs.record import check_names
from mergemill.engine.runs.traffic import find_traffic
from mergemill.engine.runs.worker.options import WorkerKeywords, WorkerOptions
from mergemill.engine.runs.worker.workers import choose_workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.urls import parse_place


def check_output(plan: Plan, out: str, **options: Unpack[RunKeywords]) -> None:
    """Raise what `run` would before anything is written where `out` cannot become the output of `plan`.

    For an output that holds something else, workers that cannot write there, and a disk without room. Storage is asked.
    """
    asked = RunOptions(**options)
    chosen = choose_workers(plan, asked)
    check_names([shard.name for shard in plan.shards] + [file.name for file in plan.files], out)
    output = find_output(parse_place(out, OutputError), chosen.storage, public=asked.public)
    output.check_workers(chosen, plan)
    output.check(plan)
    check_held(output, plan, [plan], overwrite=asked.overwrite)
    if not (asked.overwrite and is_replaced(output, plan)):  # else room was looked for with what is freed
        output.check_room(plan)


def describe_plan(plan: Plan, *, out: str | None = None, **options: Unpack[WorkerKeywords]) -> dict[str, Any]:
    """Return the plan's numbers for the workers that `run` would start with the same options: see `WorkerOptions`.

    ``projected_bytes`` is the most that a worker's tasks take together, beyond the process itself. ``remote`` is what
    goes to and from remote storage, `out` included where it is given, and the cache not counted. Raises `PlanError`
    where a part cannot run in so little memory.
    """
    out = None if out is None else parse_place(out, OutputError)
    chosen = choose_workers(plan, WorkerOptions(**options))
    beside_bytes = find_output(out, chosen.storage).beside_bytes if out is not None else 0
    check_memory(plan.parts, chosen.memory_bytes, beside_bytes)
    if plan.gates is not None:
        plan.gates.check_memory(chosen.memory_bytes)
    slowness = "" if chosen.scheduler or chosen.cluster else describe_slowness()  # of other machines nothing is known
    share_bytes = Workplace(chosen.memory_bytes, chosen.threads).share_bytes
    most_bytes = max((task_bytes(part, share_bytes) for part in plan.parts), default=0)
    return {
        "digest": plan.digest,
        "method": plan.origin.title,
        "dtype": find_dtypes(plan),
        "donor": plan.donor,
        "tensors": plan.tensors,
        "shards": [{"name": shard.name, "size_bytes": shard.size_bytes} for shard in plan.shards],
        "parts": len(plan.parts),
        "read_bytes": plan.read_bytes,
        "first_pass_bytes": plan.read_bytes if plan.scaling else 0,  # for coefficients that need all norms
        "write_bytes": plan.write_bytes,
        "workers": chosen.count,
        "scheduler": chosen.scheduler,  # of a cluster, whose workers are not known yet; empty: on this machine
        "cluster": chosen.cluster.name if chosen.cluster else "",  # that is started for the merge
        "processes": chosen.processes,  # 0: the worker is threads of this process
        "threads": chosen.threads,
        "memory_bytes": chosen.memory_bytes,
        "device": chosen.device,
        "device_memory_bytes": chosen.device_memory_bytes,
        "device_bytes": device_need(plan.parts, chosen.device)[0],  # the least that does
        "device_tensors": count_device_tensors(plan.parts, chosen.device),  # merged there; the others on the CPU
        "task_bytes": most_bytes,
        "projected_bytes": min(most_bytes * min(chosen.threads, len(plan.parts)), chosen.memory_bytes),
        "gates": None if plan.gates is None else plan.gates.describe(),
        "remote": [asdict(each) for each in find_traffic(plan, share_bytes, out)],
        "sources": [asdict(source) for source in plan.sources],
        "code": [{"name": file.name, "path": file.path, "sha256": file.sha256} for file in plan.origin.code],
        "warnings": [*plan.warnings, *filter(None, [slowness])],
    }

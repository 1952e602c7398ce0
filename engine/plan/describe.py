"""A plan in numbers, as JSON values."""

from dataclasses import asdict
from typing import Any

from mergemill.engine.plan.memory import check_memory, task_bytes
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan


def describe_plan(plan: Plan, *, memory: str | int) -> dict[str, Any]:
    """Return what the plan reads, writes and takes of a worker that is promised `memory`.

    ``projected_bytes`` is the most that one task takes, beyond the process itself. Raises `PlanError` where a part
    cannot run in so little.
    """
    memory_bytes = parse_size(memory, what="--memory")
    check_memory(plan.parts, memory_bytes)
    return {
        "digest": plan.digest,
        "method": plan.recipe.merge_method,
        "tensors": plan.tensors,
        "shards": [{"name": shard.name, "size_bytes": shard.size_bytes} for shard in plan.shards],
        "parts": len(plan.parts),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "memory_bytes": memory_bytes,
        "projected_bytes": max((task_bytes(part, memory_bytes) for part in plan.parts), default=0),
        "sources": [asdict(source) for source in plan.sources],
        "warnings": list(plan.warnings),
    }

"""How many workers a merge on this machine gets, and what each is given."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.storage.cache import CacheOptions
from mergemill.engine.tensors.merged import Merged

MEMORY = "1GiB"
SMALL_BYTES = 4 << 30  # merges that write less than this run as threads of this process
FEW_CORES = 4  # so do, on so many, merges by native loops: their threads hardly wait for the interpreter


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers there are, and what each is given."""

    processes: int  # 0: one worker, of threads of this process
    threads: int  # of each worker
    memory_bytes: int  # promised to each worker
    scheduler: str = ""  # of a cluster that is there already: its address, or its file; the others are then its own
    cache: CacheOptions | None = None  # of each host, for what is read from afar
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options of storage, by scheme

    @property
    def count(self) -> int:
        """The number of workers."""
        return max(1, self.processes)


def choose_workers(
    plan: Plan,
    *,
    workers: int | None = None,
    threads: int | None = None,
    memory: str | int = MEMORY,
    scheduler: str | None = None,
) -> Workers:
    """Return the workers of a merge: on this machine, or of a Dask cluster that is there already.

    workers: processes; 0 means threads of this process; None chooses, by the size of the merge. threads: of each
    worker; None is one a process, or as many as there are cores. memory: promised to each worker. scheduler: the
    cluster's address, such as ``tcp://10.0.0.1:8786``, or the path of its scheduler file (``….json``).
    """
    if scheduler:
        if workers is not None or threads is not None:
            raise PlanError(f"{scheduler}: has workers and threads of its own; leave out --workers and --threads")
        return Workers(0, 1, parse_size(memory, what="--memory"), scheduler)
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        alone = cores == 1 or plan.write_bytes < SMALL_BYTES or (cores <= FEW_CORES and _is_native(plan))
        workers = 0 if threads is not None or alone else cores
    return Workers(workers, threads or (1 if workers else cores), parse_size(memory, what="--memory"))


def _is_native(plan: Plan) -> bool:
    """Whether native loops do all the merging."""
    tensors = (piece.tensor for part in plan.parts for piece in part.pieces)
    return all(tensor.expression.is_native(tensor.dtype) for tensor in tensors if isinstance(tensor.expression, Merged))

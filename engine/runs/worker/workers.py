"""How many workers a merge gets, of what, and what each is given."""

from dataclasses import dataclass, replace
from pathlib import Path

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.memory import check_device_memory
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import ClusterFile
from mergemill.engine.runs.worker.accelerator import choose_device, count_devices
from mergemill.engine.runs.worker.options import WorkerOptions
from mergemill.engine.storage import system
from mergemill.engine.storage.cache import CacheOptions
from mergemill.engine.storage.store import ENVIRONMENT, Storage, join_options, make_storage

MEMORY = "1GiB"
SMALL_BYTES = 4 << 30  # merges that write less than this run as threads of this process
HERE = ("local", "cuda")  # kinds of cluster files
DEVICE_THREADS = 2  # of a worker with a device: one reads and writes while the other has it work
FEW_CORES = 4  # so do, on so many, merges by native loops: their threads hardly wait for the interpreter
MOST_PER_CORE = 4  # processes, of a core: each is one of Python with torch in it
MOST_THREADS_PER_CORE = 32  # of a process (2026-11-29): they may wait for storage, and each is a stack and arenas


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers there are, and what each is given."""

    processes: int  # 0: one worker, of threads of this process
    threads: int  # of each worker
    memory_bytes: int  # promised to each worker
    scheduler: str = ""  # of a cluster that is there already: its address, or its file; the others are then its own
    cluster: ClusterFile | None = None  # that is started for the merge; it may have fewer processes than that, and 0
    device: str = "cpu"  # that each merges on
    device_memory_bytes: int = 0  # promised to each worker, of its device
    cache: CacheOptions | None = None  # of each host, for what is read from afar
    storage: Storage = ENVIRONMENT  # how they reach it

    @property
    def count(self) -> int:
        """The number of workers."""
        return max(1, self.processes)

    @property
    def are_threads(self) -> bool:
        """Whether they are threads of this process."""
        return not self.processes and not self.scheduler and self.cluster is None

    @property
    def name(self) -> str:
        """What their user calls the cluster."""
        return self.scheduler or (self.cluster.name or self.cluster.kind if self.cluster else "the cluster")

    @property
    def is_here(self) -> bool:
        """Whether all workers are on this machine."""
        return not self.scheduler and (self.cluster is None or self.cluster.kind in HERE)


def choose_workers(plan: Plan, options: WorkerOptions) -> Workers:
    """Return the workers of a merge, of what was asked; `PlanError` for what does not go together."""
    file = options.find_cluster()
    if options.wait_s and not options.scheduler:
        raise PlanError("--wait: is for a scheduler that is there already, or will be; give --scheduler")
    _check_scheduler(options.scheduler or "")
    storage = make_storage(join_options(options.find_storage(), plan.storage))
    places = _choose_cluster(file, options) if file else _choose_places(plan, options)
    chosen = replace(places, storage=storage)
    device = options.device if options.device is not None else (file.device if file else None) or "cpu"
    if device == "cpu":
        return chosen
    kind = choose_device(device, plan, here=chosen.is_here)
    chosen = replace(chosen, device=kind)
    if kind == "cpu":
        return chosen
    memory_bytes = parse_size(options.device_memory, what="--device-memory")
    check_device_memory(plan.parts, kind, memory_bytes)
    chosen = replace(chosen, device_memory_bytes=memory_bytes)
    if options.scheduler or file:
        return chosen
    return _share_devices(chosen, count_devices(kind), options)


def is_scheduler_file(scheduler: str) -> bool:
    """Whether a scheduler is told by its file, which need not be there yet where its name says so."""
    return scheduler.endswith(".json") or Path(scheduler).is_file()


def holds_more(address: str) -> bool:
    """Whether an address has more than a scheduler's: a user, a password, a query or a fragment."""
    return any(mark in address for mark in "@?#")


def _check_scheduler(scheduler: str) -> None:
    """Raise `PlanError`, which does not repeat it, for an address with more than a scheduler's has: maybe a secret."""
    if holds_more(scheduler) and not is_scheduler_file(scheduler):
        raise PlanError(
            "--scheduler: its address holds a user, a password, a query or a fragment, which no scheduler takes and "
            "the command to resume would tell; write tcp://host:port or tls://host:port"
        )


def _share_devices(chosen: Workers, devices: int, options: WorkerOptions) -> Workers:
    """Return a worker for each of the devices of this machine, or as many as were asked for."""
    wanted = (devices if devices > 1 else 0) if options.workers is None else options.workers
    if wanted > devices:
        raise PlanError(f"--workers {wanted}: a worker has a {chosen.device} device of its own, and here are {devices}")
    return replace(chosen, processes=wanted, threads=options.threads or DEVICE_THREADS)


def _choose_places(plan: Plan, options: WorkerOptions) -> Workers:
    """Return the workers of this machine, or of a cluster that is there, and what each has of its machine."""
    memory_bytes = parse_size(MEMORY if options.memory is None else options.memory, what="--memory")
    workers, threads = options.workers, options.threads
    if options.scheduler:
        if workers is not None or threads is not None:
            raise PlanError(
                f"{options.scheduler}: has workers and threads of its own; leave out --workers and --threads"
            )
        return Workers(0, 1, memory_bytes, options.scheduler)
    cores = system.count_cores()
    if workers is None:
        alone = cores == 1 or plan.write_bytes < SMALL_BYTES or (cores <= FEW_CORES and _is_native(plan))
        workers = 0 if threads is not None or alone else cores
    most = MOST_PER_CORE * cores
    if workers > most:
        raise PlanError(
            f"--workers {workers}: this process may use {cores} of this machine's cores; give at most {most}, "
            f"or a cluster file of kind local, which is taken at its word"
        )
    threads = threads or (1 if workers else cores)
    if threads > MOST_THREADS_PER_CORE * cores:
        raise PlanError(
            f"--threads {threads}: this process may use {cores} of this machine's cores; give at most "
            f"{MOST_THREADS_PER_CORE * cores}"
        )
    return Workers(workers, threads, memory_bytes)


def _choose_cluster(file: ClusterFile, options: WorkerOptions) -> Workers:
    """Return the workers of a cluster that is to be started."""
    name = file.name or file.kind
    if options.scheduler:
        raise PlanError(
            f"{name}: is started for the merge, and {options.scheduler} is there already; give one of the two"
        )
    if options.workers is not None or options.threads is not None:
        raise PlanError(f"{name}: says itself how many workers and threads; leave out --workers and --threads")
    if options.memory is None and file.memory is not None:
        memory_bytes = parse_size(file.memory, what=f"{name}: memory")
    else:
        memory_bytes = parse_size(MEMORY if options.memory is None else options.memory, what="--memory")
    return Workers(file.count, file.threads or 1, memory_bytes, cluster=file)


def _is_native(plan: Plan) -> bool:
    """Whether native loops do all the merging."""
    tensors = (piece.tensor for part in plan.parts for piece in part.pieces)
    return all(tensor.expression.makes_natively(tensor.dtype) for tensor in tensors)

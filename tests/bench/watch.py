"""What the processes of a merge take, as the kernel counts it: memory of each worker, CPU time of all."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from mergemill.engine import run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Event, PartFinished, Started


@dataclass
class Found:
    """What one merge took, from when its workers were there to its last part, if nothing else is said."""

    workers: int
    tasks: int
    write_bytes: int
    merging_s: float
    all_s: float  # from the call to its return: workers are started, and the commit is made
    task_s: float  # of all tasks: what receipts say of their merging, where nobody has a better clock
    workers_cpu_s: float
    driver_cpu_s: float  # of this process: scheduler, client and nannies
    peak_bytes: int  # of the worker that took most, resident beside what it had before its first task
    driver_peak_bytes: int  # resident
    busy_reads: float = 0.0  # reads of a worker that were on their way, on average
    most_reads: int = 0  # and at most

    @property
    def idle_share(self) -> float:
        """The share of the workers' time that they were in no task."""
        return max(0.0, 1 - self.task_s / self.merging_s / self.workers)

    @property
    def driver_share(self) -> float:
        """The share of all CPU time that was not the workers'."""
        return self.driver_cpu_s / (self.driver_cpu_s + self.workers_cpu_s)


class Watch:
    """Notes the clocks and peaks of the workers, children of this process, at the first task and after the last."""

    def __init__(self) -> None:
        self.base_bytes: dict[int, int] = {}
        self.peak_bytes: dict[int, int] = {}
        self.marks: list[tuple[float, float, float]] = []  # wall, CPU of the workers, CPU of this process
        self.task_s = 0.0
        self._parts = 0

    def __call__(self, event: Event) -> None:
        """Take an event of `run`."""
        if isinstance(event, Started):
            self._parts = event.parts
            self.base_bytes = {process.pid: forget_peak(process.pid) for process in find_workers()}
            self._mark()
        elif isinstance(event, PartFinished):
            self.task_s += event.receipt.seconds
            if event.parts_done == self._parts:
                # One that the machine took was replaced, and nobody saw how the new one began.
                self.base_bytes = {pid: base for pid, base in self.base_bytes.items() if psutil.pid_exists(pid)}
                self._mark()
                self.peak_bytes = {pid: read_peak(pid) for pid in self.base_bytes}

    def _mark(self) -> None:
        clocks = [psutil.Process(pid).cpu_times() for pid in self.base_bytes]
        self.marks.append(
            (time.perf_counter(), sum(clock.user + clock.system for clock in clocks), time.process_time())
        )

    @property
    def taken_bytes(self) -> dict[int, int]:
        """What each worker had resident at most, beside what it had before its first task."""
        return {pid: self.peak_bytes[pid] - base for pid, base in self.base_bytes.items()}


def find_workers() -> list[psutil.Process]:
    """Return the processes that nannies of this one have started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


def forget_peak(pid: int) -> int:
    """Let the kernel's peak of a process begin anew; returns what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return read_peak(pid)


def read_peak(pid: int) -> int:
    """Return the most memory that a process had resident since its peak was forgotten."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) << 10


def measure_workers(plan: Plan, out: str, *, workers: int, threads: int, memory: str) -> Found:
    """Run a plan with worker processes of this machine, and return what that took."""
    watch = Watch()
    forget_peak(os.getpid())
    started = time.perf_counter()
    run(plan, out, workers=workers, threads=threads, memory=memory, on_event=watch)
    all_s = time.perf_counter() - started
    first, last = watch.marks
    return Found(
        workers=workers,
        tasks=len(plan.parts),
        write_bytes=plan.write_bytes,
        merging_s=last[0] - first[0],
        all_s=all_s,
        task_s=watch.task_s,
        workers_cpu_s=last[1] - first[1],
        driver_cpu_s=last[2] - first[2],
        peak_bytes=max(watch.taken_bytes.values()),
        driver_peak_bytes=read_peak(os.getpid()),
    )

"""Merges by the command line in a process of its own, and faults made at random moments of them.

This process forks its drivers, which spares them their imports; so it has no threads and no client of Dask itself.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from clusters import Foreign
from distributed import Client

from mergemill.cli import console
from mergemill.cli.main import execute
from mergemill.cli.signals import leave_on_signals

BOUND_S = 400.0  # for a merge to end, whatever happens to it: the engine's longest is 300 s without any worker
_YOUNG_S = 20.0  # the age at which a nanny has a worker
SLOW = """
import time
from mergemill.engine.runs.worker.workplace import Workplace
def make_slow(before):
    def check_going(self):
        time.sleep(0.05)
        before(self)
    return check_going
if not hasattr(Workplace, "slow"):  # it may be loaded twice
    Workplace.slow, Workplace.check_going = True, make_slow(Workplace.check_going)
"""
_FORK = multiprocessing.get_context("fork")


class Driver:
    """A merge that goes on in a process of its own; what it says is read as it comes."""

    def __init__(self, *arguments: object) -> None:
        reading, writing = os.pipe()
        self._process = _FORK.Process(target=_drive, args=(writing, [str(each) for each in arguments]))
        self._process.start()
        os.close(writing)
        self._reading = reading
        self._text = b""
        self._children: set[int] = set()
        self.events = 0  # that it has told of
        self.pid = int(self._process.pid or 0)

    @property
    def said(self) -> str:
        """What it has said."""
        return self._text.decode(errors="replace")

    def wait(self, *, events: float = float("inf"), until_s: float, place: "Place | None" = None) -> bool:
        """Wait for so many events, or for its end; False where it has ended. `until_s`: on the monotonic clock.

        place: whose workers are replaced meanwhile; what an earlier fault did to one may show late.
        """
        while self.events < events:
            if place:
                place.keep_up()
            self._children.update(child.pid for child in list_children(self.pid))
            ready, _, _ = select.select([self._reading], [], [], 0.1)
            if ready:
                text = os.read(self._reading, 1 << 16)
                self._text += text
                self.events = self._text.count(b'"event"')
            if (ready and not text) or (not ready and not self._process.is_alive()):
                return False
            assert time.monotonic() < until_s, f"it takes longer than {BOUND_S} s: {self.said[-3000:]}"
        return True

    def end(self) -> int:
        """Return its exit code, once it and the workers that it started are gone."""
        self._process.join(BOUND_S)
        assert self._process.exitcode is not None, f"it does not end: {self.said[-3000:]}"
        os.close(self._reading)
        end_s = time.monotonic() + 60
        while left := [pid for pid in self._children if is_there(pid)]:
            assert time.monotonic() < end_s, f"workers outlive their driver: {left}"
            time.sleep(0.05)
        return self._process.exitcode

    def find_workers(self) -> list[int]:
        """Return the processes of its local cluster's workers."""
        return [child.pid for child in list_children(self.pid) if is_worker(child)]


def _drive(writing: int, arguments: list[str]) -> None:
    for number in (1, 2):
        os.dup2(writing, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    leave_on_signals()
    console.silence_libraries()
    code = execute(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Place(Foreign):
    """A cluster of somebody else: it is there for many merges, and mended before each."""

    def begin(self) -> "Place":
        """Start it."""
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.address = f"tcp://{self.host}:{free.getsockname()[1]}"
        return self

    def mend(self) -> None:
        """Have a scheduler and two workers there."""
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.launch_scheduler()  # no client of this process waits for it
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGCONT)
        for worker in [each for each in self.workers if not self._is_working(each)]:
            self._drop(worker)
            self.workers.remove(worker)
        while len(self.workers) > 2:
            self._drop(self.workers.pop())
        while len(self.workers) < 2:
            self.start_worker()

    def find_workers(self) -> list[int]:
        """Return the processes that merge: children where there are nannies."""
        alive = [worker for worker in self.workers if worker.poll() is None]
        if "--no-nanny" in self.options:
            return [worker.pid for worker in alive]
        return [child.pid for worker in alive for child in list_children(worker.pid) if is_worker(child)]

    def keep_up(self) -> None:
        """Start workers in the place of those that have ended or are frozen, as a supervisor does."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for _ in range(2 - sum(self._is_working(worker) for worker in self.workers)):
            self.start_worker()

    def restart_scheduler(self) -> None:
        """Kill the scheduler, and start one at the same address with new workers, as a supervisor does."""
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()
        for worker in self.workers:
            self._drop(worker)
        self.workers.clear()
        self.mend()

    def retire(self) -> None:
        """Retire one worker, as by hand."""
        child = _FORK.Process(target=_retire_one, args=(self.address,))
        child.start()
        child.join(30)
        child.kill()

    def _is_working(self, worker: "subprocess.Popen[bytes]") -> bool:
        """Whether it merges, or will soon: a nanny may be left without a worker."""
        if not is_going(worker.pid):
            return False
        if "--no-nanny" in self.options:
            return True
        with contextlib.suppress(psutil.NoSuchProcess):
            young = time.time() - psutil.Process(worker.pid).create_time() < _YOUNG_S
            return young or any(is_worker(child) for child in list_children(worker.pid))
        return False

    @staticmethod
    def _drop(worker: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _retire_one(address: str) -> None:
    with Client(address, set_as_default=False, timeout=10) as client:
        client.retire_workers(sorted(client.scheduler_info()["workers"])[:1])


@contextlib.contextmanager
def open_place(folder: Path, *, nanny: bool) -> Iterator[Place]:
    """Have a cluster over TCP whose merges are slow enough to be disturbed."""
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "8s",
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "5",
    }
    options = ["--nthreads", "1", "--nanny" if nanny else "--no-nanny", "--local-directory", str(folder)]
    place = Place(folder, [*options, "--preload", str(folder / "slow.py")], environ).begin()
    try:
        place.mend()
        yield place
    finally:
        place.mend()  # what is frozen would not die of a group's signal alone
        place.stop()


class Disturber:
    """Makes faults of all kinds in one merge."""

    def __init__(self, rng: random.Random, driver: Driver, place: Place | None) -> None:
        self._random = rng
        self._driver = driver
        self._place = place

    def kinds(self) -> dict[str, Callable[[], object]]:
        """Return what can be done to such a merge, by name."""
        here: dict[str, Callable[[], object]] = {
            "worker killed": lambda: self._signal(signal.SIGKILL),
            "worker frozen for a while": self._freeze_for_a_while,
            "worker frozen, then killed": self._freeze_and_kill,
            "worker's writes fail": self._fail_writes,
            "driver killed": lambda: os.kill(self._driver.pid, signal.SIGKILL),
            "driver asked to end": lambda: os.kill(self._driver.pid, signal.SIGTERM),
        }
        place = self._place
        if place is None:
            return here
        return here | {
            "worker asked to end": lambda: self._signal(signal.SIGTERM),
            "worker frozen until it is given up": lambda: self._signal(signal.SIGSTOP),
            "worker retired": place.retire,
            "worker joins late": place.start_worker,
            "scheduler killed, another comes": place.restart_scheduler,
        }

    def make(self) -> str:
        """Make a fault; returns which."""
        if self._place:
            self._place.keep_up()
        kinds = self.kinds()
        kind = self._random.choice(sorted(kinds))
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            kinds[kind]()
        if self._place:
            time.sleep(0.2)
            self._place.keep_up()
        return kind

    def _find_victim(self) -> int:
        found = (self._place or self._driver).find_workers()
        if not found:
            raise ProcessLookupError
        return self._random.choice(found)

    def _signal(self, number: int) -> None:
        os.kill(self._find_victim(), number)

    def _freeze_for_a_while(self) -> None:
        victim = self._find_victim()
        os.kill(victim, signal.SIGSTOP)
        time.sleep(self._random.uniform(0.1, 1.5))
        os.kill(victim, signal.SIGCONT)

    def _freeze_and_kill(self) -> None:
        victim = self._find_victim()
        os.kill(victim, signal.SIGSTOP)
        time.sleep(self._random.uniform(0.1, 1.0))
        os.kill(victim, signal.SIGKILL)

    def _fail_writes(self) -> None:
        """No file of the worker may grow or be written beyond its first kilobytes, as on a disk that is full."""
        victim = self._find_victim()
        resource.prlimit(victim, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        time.sleep(self._random.uniform(0.1, 0.5))
        resource.prlimit(victim, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def list_children(pid: int) -> list[psutil.Process]:
    """Return what a process has started, and what that has."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def is_worker(process: psutil.Process) -> bool:
    """Whether Dask's nanny has started it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("spawn_main" in word for word in process.cmdline())
    return False


def is_there(pid: int) -> bool:
    """Whether a process has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def is_going(pid: int) -> bool:
    """Whether a process is there, and not frozen."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    return False


def say_error(text: str) -> str:
    """Return the last line of what a driver said, of which events are none."""
    lines: list[Any] = [line for line in text.splitlines() if line and not line.startswith("{")]
    return str(lines[-1]) if lines else json.dumps("nothing")

"""Dask clusters that somebody else has started: a scheduler and workers, each a process, over TCP."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from distributed import Client

WAIT_S = 60
_NO_MORE: Mapping[str, str] = MappingProxyType({})


@dataclass
class Foreign:
    """Somebody's cluster, whose processes can be killed, frozen and started again."""

    folder: Path
    options: Sequence[str]  # of each worker
    environ: Mapping[str, str]
    command: Sequence[str] = (sys.executable,)  # what each process is started by
    host: str = "127.0.0.1"
    address: str = ""
    scheduler: "subprocess.Popen[bytes] | None" = None
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def file(self) -> Path:
        """The scheduler file."""
        return self.folder / "scheduler.json"

    def start_scheduler(self) -> None:
        """Start the scheduler, and again at the same address."""
        self.launch_scheduler()
        where = {"address": self.address} if self.address else {"scheduler_file": str(self.file)}
        with Client(**where, timeout=WAIT_S, set_as_default=False) as client:
            self.address = client.scheduler.address

    def launch_scheduler(self) -> None:
        """Start the scheduler; returns at once."""
        port = self.address.rpartition(":")[2] or "0"
        self.scheduler = self._start(self.command, "dask_scheduler", "--host", self.host, "--port", port)

    def restart_scheduler(self) -> None:
        """Kill the scheduler, with which its workers end, and start another one at the same address, and a worker."""
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()
        self.start_scheduler()
        self.start_worker()

    def start_worker(self, *options: str, command: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        """Start one worker more; returns at once."""
        worker = self._start(command or self.command, "dask_worker", *self.options, *options)
        self.workers.append(worker)
        return worker

    def wait_for_workers(self, count: int) -> None:
        """Return once so many workers are there."""
        with Client(self.address, timeout=WAIT_S, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=WAIT_S)

    def stop(self) -> None:
        """Kill all that was started, and what nannies have started."""
        for process in [*self.workers, self.scheduler]:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                process.wait()

    def _start(self, command: Sequence[str], program: str, *options: str) -> "subprocess.Popen[bytes]":
        given = ["--scheduler-file", str(self.file), "--no-dashboard", *options]
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [*command, "-m", f"distributed.cli.{program}", *given],
                env=self.environ,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@contextlib.contextmanager
def start_cluster(
    folder: Path,
    *worker: str,
    count: int = 2,
    nanny: bool = False,
    environ: Mapping[str, str] = _NO_MORE,
) -> Iterator[Foreign]:
    """Start a scheduler with Dask's own settings, and workers of two threads; `environ` is theirs.

    What all of them say is in `log` of the folder.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environ}
    options = ["--nthreads", "2", "--nanny" if nanny else "--no-nanny", "--local-directory", str(folder), *worker]
    cluster = Foreign(folder, options, environ)
    try:
        cluster.start_scheduler()
        for _ in range(count):
            cluster.start_worker()
        if count:
            cluster.wait_for_workers(count)
        yield cluster
    finally:
        cluster.stop()

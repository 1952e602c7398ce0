"""Dask clusters that somebody else has started: a scheduler and workers, each a process, over TCP."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from distributed import Client

WAIT_S = 60
_NO_MORE: Mapping[str, str] = MappingProxyType({})


@dataclass
class Foreign:
    """Somebody's cluster."""

    address: str
    file: Path
    workers: list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def start_cluster(
    folder: Path, *worker: str, count: int = 2, environ: Mapping[str, str] = _NO_MORE
) -> Iterator[Foreign]:
    """Start a scheduler with Dask's own settings, and workers of two threads without nannies; `environ` is theirs.

    What all of them say is in `log` of the folder.
    """
    file = folder / "scheduler.json"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environ}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log", "ab"))

        def start(program: str, *options: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", str(file), *options]
            process = subprocess.Popen(command, env=environ, cwd=folder, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        options = ("--nthreads", "2", "--no-nanny", "--no-dashboard", "--local-directory", str(folder), *worker)
        workers = [start("dask_worker", *options) for _ in range(count)]
        with Client(scheduler_file=str(file), timeout=WAIT_S, set_as_default=False) as client:
            if count:
                client.wait_for_workers(count, timeout=WAIT_S)
            address = client.scheduler.address
        yield Foreign(address, file, workers)

"""Servers as processes with ports of their own, which end with the test: those of other people, and ours."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

Server = TypeVar("Server")

WAIT_S = 60
POLL_S = 0.05
STARTS = 3
TESTS = Path(__file__).parents[1]
LOG_TAIL_BYTES = 2000


class ServerError(Exception):
    """A server did not come up; the message ends with what it said last."""


def find_free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens on; another process may still come first."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


@contextlib.contextmanager
def start_server(command: Sequence[str], log: Path, answers: Callable[[], bool]) -> Iterator[None]:
    """Run `command` in a process group of its own until the caller is done; `answers` says when it is up.

    Its output goes to the file `log`. Where `setpriv` is there, the server also ends with a test run that is killed.
    """
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with log.open("wb") as out:
        process = subprocess.Popen([*guard, *command], stdout=out, stderr=out, cwd=log.parent, start_new_session=True)
    try:
        _wait_for(process, log, answers)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def start_process(module: str, *arguments: str) -> Iterator[str]:
    """Run a server of this folder that says its URL and ends with its input; lend the URL."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        with process.stdin:
            yield process.stdout.readline().decode().strip()


@contextlib.contextmanager
def start_on_free_ports(start: Callable[[], AbstractContextManager[Server]]) -> Iterator[Server]:
    """Enter what `start` returns, and again where the server does not come up.

    Most likely somebody took a port between the choice of it and the start.
    """
    with contextlib.ExitStack() as stack:
        for attempt in range(STARTS):
            try:
                server = stack.enter_context(start())
                break
            except ServerError:
                if attempt + 1 == STARTS:
                    raise
        yield server


def _wait_for(process: subprocess.Popen[bytes], log: Path, answers: Callable[[], bool]) -> None:
    """Return once the server answers."""
    deadline = time.monotonic() + WAIT_S
    while not answers():
        if process.poll() is not None:
            raise ServerError(f"{process.args!r} ended with {process.returncode}: {_read_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{process.args!r} did not answer in {WAIT_S} s: {_read_tail(log)}")
        time.sleep(POLL_S)


def _read_tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

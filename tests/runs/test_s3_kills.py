"""Drivers and workers killed with SIGKILL at random moments of a merge in S3: a resume ends with the same bytes.

`MERGEMILL_KILLS=200 pytest -s -n 0 tests/runs/test_s3_kills.py` makes as many kills, and says where they fell.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from runs.buckets import STATE, Place, found_by_environment, new_place, put_family
from runs.merging import hash_output, make_recipe, write_family
from servers.asked import Request
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.cli.main import execute

KILLS = int(os.environ.get("MERGEMILL_KILLS", "5"))
SHARD_SIZE = "250KB"
LATEST_S = 0.03  # after the request that a kill follows
COMMAND = (sys.executable, "-c", "from mergemill.cli.main import main; main()")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 1 MB, whose merge is five shards. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("models"), vocab=800, hidden=128, layers=1)


@pytest.fixture
def proxy(seaweed_server: S3) -> Iterator[Proxy]:
    """What the merges take for S3: it sees each of their requests."""
    with start_proxy(seaweed_server.url) as running, found_by_environment(seaweed_server.through(running.url)):
        yield running


class Killer:
    """Lets requests pass, and soon after one of them kills the driver, or one of its workers."""

    def __init__(self, after: int, delay_s: float, *, worker: bool) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.phase = ""  # where the kill fell; empty as long as nobody was killed
        self._after = after  # requests
        self._delay_s = delay_s
        self._worker = worker
        self._begun = False  # whether the output is held, and workers are there or coming
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> None:
        """Look at a request, as a rule of the proxy that makes no fault."""
        with self._lock:
            self._after -= 1
            self._begun = self._begun or (request.method == "PUT" and STATE in request.path)
            if self._after >= 0 or self.phase:
                return
            victim = self._find_victim()
            if victim is not None:
                self.phase = name_phase(request, begun=self._begun)
                threading.Timer(self._delay_s, kill, (victim,)).start()

    def _find_victim(self) -> int | None:
        assert self.process is not None
        if not self._worker:
            return self.process.pid
        return next((pid for pid in list_children(self.process.pid) if is_worker(pid)), None)


def name_phase(request: Request, *, begun: bool) -> str:
    """Return what a merge does when it asks this."""
    if request.path.endswith(".safetensors") and request.kind == "get":
        return "reading" if begun else "planning"
    if STATE in request.path:
        return "committed" if request.path.endswith("committed") else "state"
    named = {"create": "start", "list_uploads": "start", "part": "uploading", "complete": "commit", "put": "commit"}
    return named.get(request.kind, "looking" if begun else "planning")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def list_children(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return sorted(child.pid for child in psutil.Process(pid).children(recursive=True))
    return []


def is_worker(pid: int) -> bool:
    """Whether a process is one that Dask's nanny has started."""
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(psutil.Process(pid).cmdline())
    return False


class Story:
    """One output, killed now and then until it is finished or given up."""

    def __init__(self, seed: int, proxy: Proxy, out: Place, recipe: Path, requests: int) -> None:
        self.random = random.Random(seed)
        self.workers = 2 if seed % 4 == 1 else 0
        self.ends_by_abort = seed % 5 == 2
        self.phases: Counter[str] = Counter()
        self.runs = 0
        self._proxy = proxy
        self._out = out
        self._merge = ("merge", recipe, out.url, "--quiet", "--shard-size", SHARD_SIZE, "--workers", self.workers)
        self._requests = requests
        self._left: list[int] = []  # processes that a driver may have left behind

    def tell(self, expected: dict[str, str]) -> None:
        """Kill some attempts, then let one finish, and look at what is there."""
        for _ in range(self.random.randint(1, 4)):
            self._run(*self._merge, what="worker" if self.workers and self.random.random() < 0.7 else "driver")
        if self.ends_by_abort:
            self._run("abort", self._out.url, what="abort")
            assert self._run("abort", self._out.url) in (0, 2)  # 2: nothing is left, or the merge was finished
            if not self._out.is_loadable():
                self._wait_for_children()
                assert self._out.sizes() == self._out.uploads() == {}
                return
        assert self._run(*self._merge) == 0
        self._wait_for_children()
        assert self._out.hash() == expected
        assert self._out.uploads() == {}
        assert f"{STATE}lock" not in self._out.sizes()

    def _run(self, *arguments: object, what: str = "") -> int:
        """Run a command, and kill what is said; returns its exit code."""
        after = self.random.randint(0, 10 if what == "abort" else self._requests)
        killer = Killer(after if what else 1 << 30, self.random.uniform(0, LATEST_S), worker=what == "worker")
        with subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            killer.process = process
            self._proxy.rule = killer
            while process.poll() is None:
                self._left = sorted({*self._left, *list_children(process.pid)})
                time.sleep(0.02)
            assert process.stderr is not None
            said = process.stderr.read().decode()
        self._proxy.rule = lambda request: None
        self.runs += 1
        if killer.phase:
            self.phases[f"{what}: {killer.phase}"] += 1
        expected = {0, 2} if "abort" in arguments else {0}
        assert process.returncode in (expected | {-signal.SIGKILL} if what in ("driver", "abort") else expected), said
        return process.returncode

    def _wait_for_children(self) -> None:
        """Workers of a driver that was killed notice that by themselves."""
        end = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in self._left):
            assert time.monotonic() < end, "workers outlive their driver"
            time.sleep(0.05)


@pytest.mark.timeout(300 + 60 * KILLS)
def test_merges_that_are_killed_end_with_the_same_bytes(
    proxy: Proxy, seaweed_server: S3, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(make_recipe("ties", put_family(seaweed_server, models).url).text)
    assert execute(["merge", str(recipe), "expected", "--quiet", "--shard-size", SHARD_SIZE]) == 0
    expected = hash_output(tmp_path / "expected")
    undisturbed = new_place(seaweed_server)
    before = len(proxy.journal.exchanges)
    assert execute(["merge", str(recipe), undisturbed.url, "--quiet", "--shard-size", SHARD_SIZE]) == 0
    requests = len(proxy.journal.exchanges) - before
    assert undisturbed.hash() == expected

    phases: Counter[str] = Counter()
    stories = runs = 0
    while phases.total() < KILLS:
        story = Story(stories, proxy, new_place(seaweed_server), recipe, requests)
        story.tell(expected)
        stories, runs, phases = stories + 1, runs + story.runs, phases + story.phases
        fell = ", ".join(f"{phase} {count}" for phase, count in sorted(phases.items()))
        print(f"\n{phases.total()} kills, {runs} runs, {stories} merges of {requests} requests: {fell}")  # noqa: T201
    assert Place(seaweed_server, "").uploads() == {}

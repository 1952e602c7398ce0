"""Clusters that are lost, or of which a worker freezes, before the first task: one error that says how to go on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import dask
import psutil
import pytest
from clusters import Foreign, start_cluster
from distributed import Client
from distributed.client import FutureCancelledError
from runs.merging import hash_output, is_loadable, plan_merge

from mergemill.engine import run
from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.clusters import cluster, connect, dask_crew, preflight, watch
from mergemill.engine.runs.clusters.cluster import open_cluster
from mergemill.engine.runs.clusters.plugin import MergemillPlugin
from mergemill.engine.runs.worker.workers import Workers

LOST = r"the scheduler is lost .*run the same command again to resume"


@pytest.mark.parametrize(
    ("module", "when"), [(cluster, "check_workers"), (dask_crew, "check_settings"), (dask_crew, "check_workers")]
)
def test_a_scheduler_that_is_killed_while_workers_are_asked_ends_the_run_with_one_error(
    module: ModuleType, when: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge("linear", family)
    before: Callable[..., object] = getattr(module, when)
    with start_cluster(tmp_path) as own:

        def kill_first(*args: object, **more: object) -> object:
            kill(own)
            return before(*args, **more)

        monkeypatch.setattr(module, when, kill_first)
        with pytest.raises(ClusterError, match=LOST):
            run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB")
    assert not is_loadable(tmp_path / "out")


class Broken:
    """A client whose connection breaks while it waits: Dask cancels all that it waits for."""

    def submit(self, function: object, pure: bool) -> "Broken":
        """The one task."""
        return self

    def result(self, timeout: float) -> int:
        """Dask's error."""
        raise FutureCancelledError("int-1", "lost")


def test_a_connection_that_breaks_while_the_first_worker_is_waited_for_is_a_lost_scheduler() -> None:
    with pytest.raises(ClusterError, match=f"^mine.yml: {LOST}"), watch.explaining_loss("mine.yml"):
        connect.wait_for_first(Broken(), lambda: None, lambda waited_s: None)


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("ConnectionPool is closed")])
def test_a_client_is_closed_whatever_has_become_of_its_scheduler(error: Exception) -> None:
    """Dask's close tells what the farewell met, or an attempt to connect again that was under way."""
    closed: list[float] = []

    class Lost:
        def close(self, timeout: float) -> None:
            closed.append(timeout)
            raise error

    connect.close_client(cast("Client", Lost()))
    assert closed == [connect.CLOSE_S]


def test_a_scheduler_file_of_something_else_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text("[]")
    with pytest.raises(ClusterError, match="no Dask scheduler answers there"):
        connect.open_client(str(tmp_path / "scheduler.json"))


def kill(own: Foreign) -> None:
    assert own.scheduler is not None
    own.scheduler.kill()
    own.scheduler.wait()


def test_a_worker_that_is_frozen_before_it_is_asked_is_named(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "ANSWER_S", 2.0)
    plan = plan_merge("linear", family)
    with start_cluster(tmp_path) as own:
        own.workers[0].send_signal(signal.SIGSTOP)
        with pytest.raises(ClusterError, match=r"TimeoutError: it is silent for 2 s +a worker that answers"):
            run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB")
        assert not (tmp_path / "out").exists()
        own.workers[0].send_signal(signal.SIGCONT)
        run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB")
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")


def test_a_worker_of_ours_that_is_killed_while_it_starts_is_one_error() -> None:
    with (
        dask.config.set({"distributed.worker.preload": ["import os; os._exit(3)"]}),
        pytest.raises(ClusterError, match=r"a worker ended, or was killed, while it started .* again to resume"),
        open_cluster(Workers(1, 1, 1 << 28)),
    ):
        pass
    assert not [each for each in psutil.Process(os.getpid()).children() if "spawn_main" in " ".join(each.cmdline())]


def test_a_worker_of_ours_that_is_killed_once_while_it_starts_is_replaced(tmp_path: Path) -> None:
    first = tmp_path / "died"
    dying = f"import os; os.path.exists({str(first)!r}) or (open({str(first)!r}, 'x').close(), os.kill(os.getpid(), 9))"
    with dask.config.set({"distributed.worker.preload": [dying]}), open_cluster(Workers(1, 1, 1 << 28)) as crew:
        assert first.exists()
        assert crew.client.submit(sum, [1, 2]).result() == 3


def test_a_worker_of_ours_that_is_killed_while_it_is_set_up_is_replaced(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask ends its call to all workers then, as if the scheduler were lost."""
    dying = f"""
import os
from mergemill.engine.runs.clusters.plugin import MergemillPlugin
def die_first(self, worker, set_up=MergemillPlugin.setup):
    try:
        open({str(tmp_path / "died")!r}, "x").close()
    except FileExistsError:
        set_up(self, worker)
    else:
        os.kill(os.getpid(), 9)
if MergemillPlugin.setup.__name__ == "setup":
    MergemillPlugin.setup = die_first
"""
    monkeypatch.setattr(MergemillPlugin, "setup", MergemillPlugin.setup)  # a nanny runs the preload too
    plan = plan_merge("linear", family)
    with dask.config.set({"distributed.worker.preload": [dying]}):
        run(plan, tmp_path / "out", workers=2)
    assert (tmp_path / "died").exists()
    assert is_loadable(tmp_path / "out")

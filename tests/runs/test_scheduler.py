"""Merges on a Dask cluster that is there already: a real scheduler and real workers, each a process, over TCP."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import WAIT_S, Foreign, start_cluster
from distributed import Client
from runs.merging import METHODS, hash_output, plan_merge

from mergemill.cli.merge import describe_wait
from mergemill.engine import describe_plan, run
from mergemill.engine.errors import ClusterError, PlanError
from mergemill.engine.runs.clusters import connect
from mergemill.engine.runs.clusters.cluster import open_scheduler
from mergemill.engine.runs.clusters.dask_crew import Foreign as Crew
from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.events import Event, PartFinished, Started, Waiting
from mergemill.engine.runs.worker.accelerator import count_devices
from mergemill.engine.runs.worker.workers import Workers

FOREIGN = """
import importlib.metadata
from importlib.metadata import Distribution
def version(name):
    if name == "torch":
        return "1.0.0"
    if name == "mergemill":
        raise importlib.metadata.PackageNotFoundError(name)
    return Distribution.from_name(name).version
importlib.metadata.version = version
"""

OTHER = """
import importlib.metadata
from importlib.metadata import Distribution
def version(name):
    return {"mergemill": "0.0.1", "torch": "1.0.0"}.get(name) or Distribution.from_name(name).version
importlib.metadata.version = version
"""

BLIND = """
import errno, os
def hide(function):
    def call(path, *rest, **more):
        if str(path).startswith({folder!r}):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return function(path, *rest, **more)
    return call
os.open, os.stat = hide(os.open), hide(os.stat)
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    """A cluster of two workers, kept for all tests."""
    with start_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.mark.parametrize("method", METHODS)
def test_its_workers_write_the_same_bytes(method: str, family: Path, tmp_path: Path, foreign: Foreign) -> None:
    plan = plan_merge(method, family)
    run(plan, tmp_path / "here", workers=0, threads=1)
    events: list[Event] = []
    run(plan, tmp_path / "there", scheduler=foreign.address, memory="256MiB", on_event=events.append)
    assert hash_output(tmp_path / "there") == hash_output(tmp_path / "here")
    (started,) = (event for event in events if isinstance(event, Started))
    assert (started.workers, started.threads, started.memory_bytes) == (2, 2, 256 << 20)


def test_workers_without_the_device_are_told_before_anything_is_written(
    family: Path, tmp_path: Path, foreign: Foreign
) -> None:
    if count_devices("cuda"):
        pytest.skip("there is a CUDA device")
    with pytest.raises(ClusterError, match=r"no cuda device +a worker with such a device, or --device cpu"):
        run(plan_merge("linear", family), tmp_path / "out", scheduler=foreign.address, device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_scheduler_file_and_a_relative_output_will_do(
    family: Path, tmp_path: Path, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_merge("linear", family)
    run(plan, "out", scheduler=str(foreign.file))
    run(plan, "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")


def test_the_same_plan_twice_at_once_is_two_runs(family: Path, tmp_path: Path, foreign: Foreign) -> None:
    """Neither takes the other's tasks for its own, and the end of one does not stop the other."""
    plan = plan_merge("ties", family)
    nested = []

    def start_another(event: Event) -> None:
        if isinstance(event, PartFinished) and not nested:
            nested.append(run(plan, tmp_path / "second", scheduler=foreign.address))

    run(plan, tmp_path / "first", scheduler=foreign.address, on_event=start_another)
    assert nested[0].redone_parts == len(plan.parts)
    assert hash_output(tmp_path / "first") == hash_output(tmp_path / "second")


def test_nothing_is_left_on_the_workers(family: Path, tmp_path: Path, foreign: Foreign) -> None:
    run(plan_merge("linear", family), tmp_path / "out", scheduler=foreign.address)
    with Client(foreign.address, set_as_default=False) as client:
        plugins = client.run(lambda dask_worker: list(dask_worker.plugins))
    assert not [name for names in plugins.values() for name in names if "mergemill" in name]


def test_what_a_killed_driver_left_on_the_workers_is_taken_away(family: Path, tmp_path: Path, foreign: Foreign) -> None:
    """Or its arenas would stay beside those of the next merge."""
    client = Client(foreign.address, set_as_default=False)
    crew = Crew(client, Workers(0, 1, 1 << 28, foreign.address), "of-the-killed", lambda waited_s: None)
    crew.join()
    with open_scheduler(crew.workers, "of-another", lambda waited_s: None):
        client.close()  # and not crew.close()
        seen: list[list[str]] = []

        def look(event: Event) -> None:
            if isinstance(event, Started):
                seen.extend(list_plugins(foreign).values())

        run(plan_merge("linear", family), tmp_path / "out", scheduler=foreign.address, memory="256MiB", on_event=look)
        assert len(seen) == 2
        for names in seen:
            assert not any("of-the-killed" in name for name in names)
            assert sum("of-another" in name for name in names) == 1, "whose driver lives"


def list_plugins(own: Foreign) -> dict[str, list[str]]:
    """Return the names of our plugins on each worker."""
    with Client(own.address, set_as_default=False) as client:
        found = client.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("mergemill-")])
    return {address: list(names) for address, names in found.items()}


def test_a_killed_worker_costs_its_parts_only(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("dare_ties", family)
    with start_cluster(tmp_path) as own:
        killed = []

        def kill(event: Event) -> None:
            if isinstance(event, PartFinished) and not killed:
                killed.append(own.workers[0])
                own.workers[0].send_signal(signal.SIGKILL)

        run(plan, tmp_path / "out", scheduler=own.address, on_event=kill)
    run(plan, tmp_path / "here", workers=0)
    assert killed
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")


def test_workers_that_lack_what_is_here_are_named_before_anything_is_written(family: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(FOREIGN)
    with (
        start_cluster(tmp_path, "--preload", str(tmp_path / "other.py")) as own,
        pytest.raises(ClusterError) as caught,
    ):
        run(plan_merge("linear", family), tmp_path / "out", scheduler=own.address)
    message = str(caught.value)
    assert message.count("mergemill is not installed") == message.count("torch 1.0.0") == 2
    assert "as here" in message
    assert not (tmp_path / "out").exists()


def test_files_that_workers_do_not_see_are_named(tmp_path: Path, foreign: Foreign) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"four")
    with open_scheduler(Workers(0, 1, 1 << 28, foreign.address), "token", pytest.fail) as crew:
        crew.check_needs(Needs({str(there): 4}))
        with pytest.raises(ClusterError) as caught:
            crew.check_needs(Needs({str(there): 5, "/no/such/file": 1}))
    assert str(caught.value).count(f"{there}: has 4 bytes, not 5") == 2
    assert str(caught.value).count("/no/such/file: No such file") == 2


def test_settings_of_the_scheduler_that_harm_are_warned_of(foreign: Foreign, tmp_path: Path) -> None:
    with open_scheduler(Workers(0, 1, 1 << 28, foreign.address), "token", pytest.fail) as crew:
        assert crew.warnings == ()  # of Dask's own settings none harms
        with Client(foreign.address, set_as_default=False) as client:
            before = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures)
            client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    with open_scheduler(Workers(0, 1, 1 << 28, foreign.address), "token", pytest.fail) as crew:
        warnings = crew.warnings
    with Client(foreign.address, set_as_default=False) as client:  # the other tests' cluster, too
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", before))
    assert "allowed-failures 0" in warnings[0]


def test_a_scheduler_that_is_not_there(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CONNECT_S", 2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
    for wrong in (address, str(tmp_path / "none.json"), "nonsense://host:1"):
        with pytest.raises(ClusterError, match="no Dask scheduler answers there"):
            run(plan_merge("linear", family), tmp_path / "out", scheduler=wrong)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_is_not_there_yet_is_waited_for(family: Path, tmp_path: Path) -> None:
    plan, told = plan_merge("linear", family), list[Waiting]()
    with start_cluster(tmp_path, count=0) as own:
        assert own.scheduler is not None
        own.scheduler.kill()
        own.scheduler.wait()

        def come(event: Event) -> None:
            if isinstance(event, Waiting):
                told.append(event)
                if event.missing == "scheduler":
                    own.start_scheduler()
                    own.start_worker()

        run(plan, tmp_path / "out", scheduler=own.address, wait_s=60, on_event=come)
        assert told[0] == Waiting(own.address, 0.0, "scheduler")
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    assert describe_wait(told[0]) == f"{own.address}: waiting for this scheduler"
    later = replace(told[0], waited_s=61.2)
    assert describe_wait(later) == f"{own.address}: it has not answered for 61 s; waiting for this scheduler"


def test_only_a_scheduler_can_be_waited_for(family: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^--wait: .* give --scheduler$"):
        run(plan_merge("linear", family), tmp_path / "out", wait_s=60)
    with pytest.raises(PlanError, match=r"^--wait: .* give --scheduler$"):
        describe_plan(plan_merge("linear", family), wait_s=60)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["tcp://me:hush@h:8786", "hush@h:8786", "tls://h:8786?token=hush", "tcp://h:1#hush"]
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str, family: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^--scheduler: .* write tcp://host:port") as refused:
        run(plan_merge("linear", family), tmp_path / "out", scheduler=address)
    assert "hush" not in str(refused.value)
    with pytest.raises(PlanError, match=r"^--scheduler: "):
        describe_plan(plan_merge("linear", family), scheduler=address)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "told", ["", "[" * 100_000, "[1]", "{}", '{"address": 7}', '{"address": "tcp://me:hush@h:8786"}', "x" * (2 << 20)]
)
def test_a_file_that_names_no_scheduler_is_one_line(told: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text(told)
    with pytest.raises(ClusterError, match=r"^.*scheduler\.json: no Dask scheduler answers there: ") as refused:
        connect.open_client(str(tmp_path / "scheduler.json"))
    assert "hush" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 200


def test_a_pipe_in_the_place_of_a_schedulers_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scheduler.json")
    with pytest.raises(ClusterError, match="it is a pipe, not a file"):
        connect.open_client(str(tmp_path / "scheduler.json"))


def test_a_scheduler_without_workers(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "WORKERS_S", 1)
    with start_cluster(tmp_path, count=0) as own, pytest.raises(ClusterError, match="no worker has joined"):
        run(plan_merge("linear", family), tmp_path / "out", scheduler=own.address)
    assert not (tmp_path / "out").exists()


def test_a_first_worker_that_comes_late_is_waited_for(family: Path, tmp_path: Path) -> None:
    plan, told = plan_merge("linear", family), list[Waiting]()
    with start_cluster(tmp_path, count=0) as own:

        def start_one(event: Event) -> None:
            if isinstance(event, Waiting):
                told.append(event)
                if len(told) == 1:
                    own.start_worker()

        committed = run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB", on_event=start_one)
        assert told[0] == Waiting(own.address, 0.0)
    assert committed.redone_parts == len(plan.parts)


def test_workers_of_ones_own_and_a_scheduler_exclude_each_other(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", family)
    with pytest.raises(PlanError, match="leave out --workers and --threads"):
        run(plan, tmp_path / "out", scheduler="tcp://127.0.0.1:1", workers=2)
    assert describe_plan(plan, memory="1GiB", scheduler="tcp://127.0.0.1:1")["scheduler"] == "tcp://127.0.0.1:1"


def test_a_worker_that_joins_late_takes_part(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("ties", family)
    with start_cluster(tmp_path, count=1) as own:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", own.address, "--no-nanny", "--no-dashboard"]
        late: list[subprocess.Popen[bytes]] = []

        def join(event: Event) -> None:
            if isinstance(event, Started):
                environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
                late.append(subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.DEVNULL))
                with Client(own.address, set_as_default=False) as client:
                    client.wait_for_workers(2, timeout=WAIT_S)
                    time.sleep(0.5)
                    plugins = client.run(lambda dask_worker: list(dask_worker.plugins))
                assert all(any("mergemill" in name for name in names) for names in plugins.values())

        try:
            run(plan, tmp_path / "out", scheduler=own.address, on_event=join)
        finally:
            for process in late:
                process.kill()
                process.wait()
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")


def test_a_worker_of_other_versions_that_joins_late_is_named(family: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OTHER)

    def join(event: Event) -> None:
        if isinstance(event, Started):
            own.start_worker("--preload", str(tmp_path / "other.py"))
            own.wait_for_workers(2)

    with start_cluster(tmp_path, count=1) as own, pytest.raises(ClusterError) as caught:
        run(plan_merge("ties", family), tmp_path / "out", scheduler=own.address, on_event=join)
    message = str(caught.value)
    assert "the cluster's workers cannot do this merge" in message
    assert message.count("mergemill 0.0.1") == message.count("torch 1.0.0") == message.count("tcp://") / 2 == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_late_worker_that_does_not_see_the_models_is_named(family: Path, tmp_path: Path) -> None:
    (tmp_path / "blind.py").write_text(BLIND.format(folder=str(family)))

    def join(event: Event) -> None:
        if isinstance(event, Started):
            own.start_worker("--preload", str(tmp_path / "blind.py"))
            own.wait_for_workers(2)
            own.workers[0].kill()  # else it might do all before

    with start_cluster(tmp_path, count=1) as own, pytest.raises(ClusterError) as caught:
        run(plan_merge("ties", family), tmp_path / "out", scheduler=own.address, on_event=join)
    message = str(caught.value)
    assert "the cluster's workers cannot do this merge" in message
    assert message.count(": No such file or directory") == message.count(f"{family}/") == message.count("tcp://") > 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_late_worker_that_cannot_load_mergemill_does_not_take_part(family: Path, tmp_path: Path) -> None:
    """Dask lets no worker join that cannot load a plugin, and its log says why."""
    (tmp_path / "without.py").write_text("import sys\nsys.modules['mergemill'] = None\n")
    plan = plan_merge("ties", family)

    def join(event: Event) -> None:
        if isinstance(event, Started):
            own.start_worker("--preload", str(tmp_path / "without.py")).wait(WAIT_S)

    with start_cluster(tmp_path, count=1) as own:
        run(plan, tmp_path / "out", scheduler=own.address, on_event=join)
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    assert "ModuleNotFoundError" in (tmp_path / "log").read_text()

"""What happens to a cluster in the middle of a merge: real processes over TCP, and the bytes of an undisturbed merge.

Every fault is made from the driver's own events, while parts are being merged.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from clusters import Foreign, start_cluster
from distributed import Client
from runs.merging import finished_parts, hash_output, is_loadable, plan_merge, slowed

from mergemill.engine import load_recipe, make_plan, run, verify
from mergemill.engine.errors import ClusterError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_cluster
from mergemill.engine.runs.clusters import cluster, connect, watch
from mergemill.engine.runs.events import Event, PartFinished, Waiting

pytestmark = pytest.mark.slow

METHOD = "dare_ties"  # rounds of statistics, then the merge
SOON = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s"}  # less, and workers of a busy machine are given up too
SLOW_S = 0.05  # a slab


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge(METHOD, family)


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an undisturbed merge."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan, out, workers=0, threads=2)
    return hash_output(out)


@contextlib.contextmanager
def thawed(pid: int) -> Iterator[None]:
    """Let a process go on afterwards, if it is there still."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Fault:
    """Does something once, when some parts are finished."""

    def __init__(self, make: Callable[[], object], after: int = 4) -> None:
        self.parts: list[int] = []  # as they were finished
        self.made_after = 0  # parts; 0 as long as it is not made
        self._make = make
        self._after = after

    def __call__(self, event: Event) -> None:
        if isinstance(event, PartFinished):
            self.parts.append(event.receipt.part)
            if len(self.parts) >= self._after and not self.made_after:
                self.made_after = len(self.parts)
                self._make()


def merge_with(fault: Fault, plan: Plan, out: Path, own: Foreign) -> None:
    with slowed(SLOW_S):
        run(plan, out, scheduler=own.address, memory="256MiB", on_event=fault)
    assert 0 < fault.made_after < len(plan.parts)
    assert sorted(fault.parts) == list(range(len(plan.parts))), "each part has one receipt"
    assert sorted(finished_parts(out)) == sorted(fault.parts)


def wait_for_ends(processes: Sequence[int]) -> None:
    end_s = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in processes):
        assert time.monotonic() < end_s, "they are there still"
        time.sleep(0.05)


def test_a_frozen_worker_is_given_up_and_does_no_harm_when_it_goes_on(
    plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    with start_cluster(tmp_path, environ=SOON) as own:
        frozen = own.workers[0]
        with thawed(frozen.pid):
            merge_with(Fault(lambda: frozen.send_signal(signal.SIGSTOP)), plan, tmp_path / "out", own)
            assert hash_output(tmp_path / "out") == expected
        frozen.wait(60)  # it learns that it was given up, and ends
        assert hash_output(tmp_path / "out") == expected
        assert verify(tmp_path / "out").parts == len(plan.parts)


def test_a_frozen_worker_of_ours_is_replaced(
    plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.FROZEN_S * 2 + 4 < 60  # Dask looks once in that time, and gives a worker 4 s to end
    monkeypatch.setitem(cluster._CONFIG, "distributed.scheduler.worker-ttl", "2s")
    frozen: list[int] = []

    def freeze() -> None:
        children = psutil.Process().children(recursive=True)
        frozen.append(next(each.pid for each in children if any("spawn_main" in word for word in each.cmdline())))
        os.kill(frozen[0], signal.SIGSTOP)

    with slowed(SLOW_S):
        run(plan, tmp_path / "out", workers=2, on_event=Fault(freeze))
    wait_for_ends(frozen)
    assert hash_output(tmp_path / "out") == expected


@pytest.mark.parametrize("way", ["retired", "asked to end"])
def test_a_worker_that_leaves_takes_no_part_with_it(
    way: str, plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    with start_cluster(tmp_path) as own:

        def retire() -> None:
            if way == "asked to end":
                own.workers[0].send_signal(signal.SIGTERM)  # as by scancel, or for a pod that is deleted
                return
            with Client(own.address, set_as_default=False) as client:
                client.retire_workers([next(iter(client.scheduler_info()["workers"]))])

        merge_with(Fault(retire), plan, tmp_path / "out", own)
        assert hash_output(tmp_path / "out") == expected


def test_the_next_scheduler_at_the_same_address_goes_on_with_what_is_left(
    plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    with start_cluster(tmp_path) as own:
        fault = Fault(own.restart_scheduler)
        merge_with(fault, plan, tmp_path / "out", own)
        assert hash_output(tmp_path / "out") == expected


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_scheduler_that_is_lost_ends_the_run_which_resumes(
    way: signal.Signals, plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((connect, "CONNECT_S"), (connect, "REJOIN_S"), (watch, "LOOK_S"), (watch, "ANSWER_S")):
        monkeypatch.setattr(module, name, 1)
    out = tmp_path / "out"
    with start_cluster(tmp_path) as own:
        assert own.scheduler is not None
        fault = Fault(lambda: own.scheduler and own.scheduler.send_signal(way))
        with thawed(own.scheduler.pid), slowed(SLOW_S), pytest.raises(ClusterError) as caught:
            run(plan, out, scheduler=own.address, memory="256MiB", on_event=fault)
    assert f"{own.address}: the scheduler is lost" in str(caught.value)
    assert "run the same command again to resume" in str(caught.value)
    assert not is_loadable(out)
    committed = run(plan, out, workers=0)
    assert committed.redone_parts <= len(plan.parts) - fault.made_after
    assert hash_output(out) == expected


def test_a_cluster_that_loses_all_workers_ends_the_run_which_resumes(
    plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.5)
    monkeypatch.setattr(watch, "TELL_S", 0.2)
    monkeypatch.setattr(cluster.Foreign, "alone_s", 4.0)
    out, waited = tmp_path / "out", list[Waiting]()
    with start_cluster(tmp_path) as own:
        fault = Fault(lambda: [worker.kill() for worker in own.workers])

        def follow(event: Event) -> None:
            fault(event)
            if isinstance(event, Waiting):
                waited.append(event)

        with (
            slowed(SLOW_S),
            pytest.raises(ClusterError, match=r"been there for 4 s; start some.*to resume"),
        ):
            run(plan, out, scheduler=own.address, memory="256MiB", on_event=follow)
        assert 0.2 < waited[0].waited_s < waited[-1].waited_s <= 4.0
        assert {each.cluster for each in waited} == {own.address}
        own.start_worker()
        run(plan, out, scheduler=own.address, memory="256MiB")
    assert hash_output(out) == expected


@pytest.mark.parametrize("way", ["two workers", "a cluster file"])
def test_a_local_cluster_whose_workers_cannot_start_again_ends_the_run_which_resumes(
    way: str, plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parse_cluster("kind: local\nworkers: 2\nmemory: 512MiB\n", name="mine.yml")
    given: Any = {"workers": 2} if way == "two workers" else {"cluster": file}
    monkeypatch.setattr(watch, "LOOK_S", 0.5)
    monkeypatch.setattr(cluster.Cluster, "alone_s", 1.0)
    flag, out = tmp_path / "flag", tmp_path / "out"

    def kill_all() -> None:
        flag.touch()
        for each in psutil.Process().children(recursive=True):
            if any("spawn_main" in word for word in each.cmdline()):
                each.kill()

    with (
        dask.config.set({"distributed.worker.preload": [f"import os; os.path.exists({str(flag)!r}) and os._exit(3)"]}),
        slowed(SLOW_S),
        pytest.raises(ClusterError, match=r"for 1 s; those that were started here end.*to resume"),
    ):
        run(plan, out, **given, on_event=Fault(kill_all))
    run(plan, out, workers=0)
    assert hash_output(out) == expected


DEADLY = '''\
"""A method that ends its worker."""

import os

from torch import Tensor

from mergemill.engine.methods import merge_method


@merge_method(reads="element")
def deadly(models: list[Tensor]) -> Tensor:
    """No result."""
    os._exit(9)
'''


def test_a_part_of_which_every_worker_dies_is_named_with_its_inputs(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster._CONFIG, "distributed.scheduler.allowed-failures", 1)
    (tmp_path / "deadly.py").write_text(DEADLY)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: deadly\nmethods: deadly.py\nmodels: [{{model: {family / 'A'}}}, {{model: {family / 'B'}}}]\n"
    )
    with pytest.raises(RunError, match=r"\.weight.*, read from .*/A/.*, .*/B/.*: 2 workers died while they had it"):
        run(make_plan(load_recipe(str(recipe))), tmp_path / "out", workers=1)
    assert not is_loadable(tmp_path / "out")

"""How often parts are merged when a worker dies, counted where that is done: in the workers, by a preload."""

import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from clusters import start_cluster
from runs.merging import hash_output, plan_merge, slowed

from mergemill.engine import run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.clusters.results import TaskResults
from mergemill.engine.runs.events import Event, PartFinished

pytestmark = pytest.mark.slow

COUNTED = """
import os, time
from pathlib import Path
from mergemill.engine.runs.tasks import task
folder, merge = Path(os.environ["COUNTED_IN"]), getattr(task.run_part, "counts", task.run_part)  # it is loaded twice
def is_greedy():
    try:
        (folder / "greedy").rename(folder / "was greedy")
    except FileNotFoundError:
        return False
    return True  # one task alone
def run_part(part, *rest):
    with open(folder / "executions", "a") as file:
        file.write(f"{part.number}\\n")
    if is_greedy():
        taken = [bytearray(64 << 20) for _ in range(16)]
        time.sleep(60)
    return merge(part, *rest)
run_part.counts = merge
task.run_part = run_part  # tasks find it by its name
"""
THREADS = 2  # of a worker


@pytest.fixture
def plan(family: Path) -> Plan:
    return plan_merge("task_arithmetic", family)


@pytest.fixture
def counted(tmp_path: Path) -> Mapping[str, str]:
    """Environment of workers that preload ``counted.py``."""
    (tmp_path / "counted.py").write_text(COUNTED)
    return {"COUNTED_IN": str(tmp_path)}


def count_executions(folder: Path) -> Counter[int]:
    return Counter(map(int, (folder / "executions").read_text().split()))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """When the driver heard that each part was done."""
    parts: dict[int, float] = {}
    hear = TaskResults._hear

    def listen(results: TaskResults, event: tuple[float, Any]) -> None:
        hear(results, event)
        if "result" in event[1]:
            for receipt in pickle.loads(event[1]["result"]):
                parts.setdefault(receipt.part, time.monotonic())

    monkeypatch.setattr(TaskResults, "_hear", listen)
    return parts


class Holding:
    """Holds the driver up in the news of a part, before and after a fault: others are done meanwhile."""

    soon_s = 0.25  # in which a scheduler learns what the driver knows

    def __init__(self, held_s: float, heard: dict[int, float], make: Callable[[], None]) -> None:
        self.held_s = held_s
        self.heard = heard
        self.make = make
        self.heard_before: set[int] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PartFinished) and not self.heard_before and len(self.list_heard()) >= 4:
            time.sleep(self.held_s)
            self.heard_before = self.list_heard()
            self.make()
            time.sleep(self.held_s)

    def list_heard(self) -> set[int]:
        """Return the parts of which the scheduler knows that the driver knows."""
        end_s = time.monotonic() - self.soon_s
        return {part for part, when_s in list(self.heard.items()) if when_s < end_s}

    def check(self, plan: Plan, executions: Counter[int], threads: int) -> None:
        """No part is merged again of which the driver knew; of each thread the one at hand, and one just done, may."""
        assert 4 + 2 * bool(self.held_s) <= len(self.heard_before) < len(plan.parts)
        assert {executions[part] for part in self.heard_before} == {1}
        assert set(executions) == {part.number for part in plan.parts}
        assert executions.total() <= len(plan.parts) + 2 * threads


@pytest.mark.parametrize("held_s", [0, 0.6], ids=["at once", "while the driver is held up"])
def test_only_what_a_killed_worker_had_at_hand_is_merged_again(
    plan: Plan, counted: Mapping[str, str], heard: dict[int, float], tmp_path: Path, held_s: float
) -> None:
    with start_cluster(tmp_path, "--preload", str(tmp_path / "counted.py"), environ=counted) as own:

        def kill() -> None:
            own.workers[0].kill()
            own.workers[0].wait()

        fault = Holding(held_s, heard, kill)
        with slowed(0.1):
            run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB", on_event=fault)
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    fault.check(plan, count_executions(tmp_path), THREADS)


def test_results_that_came_before_the_scheduler_was_lost_are_taken(
    plan: Plan, counted: Mapping[str, str], heard: dict[int, float], tmp_path: Path
) -> None:
    with start_cluster(tmp_path, "--preload", str(tmp_path / "counted.py"), environ=counted) as own:
        fault = Holding(0.6, heard, own.restart_scheduler)
        with slowed(0.1):
            run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB", on_event=fault)
    run(plan, tmp_path / "here", workers=0)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    fault.check(plan, count_executions(tmp_path), 2 * THREADS)


def test_a_worker_that_is_killed_for_its_memory_costs_the_parts_at_hand(
    plan: Plan, counted: Mapping[str, str], tmp_path: Path
) -> None:
    """By Dask's nanny: one task takes a gigabyte that nobody promised it."""
    (tmp_path / "greedy").touch()
    options = ("--preload", str(tmp_path / "counted.py"), "--memory-limit", "700MiB")
    with start_cluster(tmp_path, *options, nanny=True, environ=counted) as own:
        run(plan, tmp_path / "out", scheduler=own.address, memory="128MiB")
        log = (tmp_path / "log").read_text()
    run(plan, tmp_path / "here", workers=0)
    assert (tmp_path / "was greedy").exists()
    assert "exceeded 95% memory budget" in log
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    assert count_executions(tmp_path).total() <= len(plan.parts) + THREADS

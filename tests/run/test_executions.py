"""How often parts are merged when a worker dies, counted where that is done: in the workers, by a preload."""

import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from clusters import start_cluster
from run.merging import hash_output, plan_merge, slowed

from mergemill.engine import PartFinished, run
from mergemill.engine.plan.values import Plan
from mergemill.engine.run.events import Event

pytestmark = pytest.mark.slow

COUNTED = """
import os, time
from pathlib import Path
from mergemill.engine.run.tasks import task
folder, merge = Path(os.environ["COUNTED_IN"]), getattr(task.run_part, "counts", task.run_part)  # it is loaded twice
def run_part(part, *rest):
    with open(folder / "executions", "a") as file:
        file.write(f"{part.number}\\n")
    if (folder / "greedy").exists():
        (folder / "greedy").rename(folder / "was greedy")  # one process alone can
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


def test_only_what_a_killed_worker_had_at_hand_is_merged_again(
    plan: Plan, counted: Mapping[str, str], tmp_path: Path
) -> None:
    before: list[int] = []
    with start_cluster(tmp_path, "--preload", str(tmp_path / "counted.py"), environ=counted) as own:

        def kill(event: Event) -> None:
            if isinstance(event, PartFinished) and own.workers[0].poll() is None:
                before.append(event.receipt.part)
                if len(before) == 4:
                    own.workers[0].send_signal(signal.SIGKILL)
                    own.workers[0].wait()

        with slowed(0.05):
            run(plan, tmp_path / "out", scheduler=own.address, memory="256MiB", on_event=kill)
    run(plan, tmp_path / "here", workers=0)
    executions = count_executions(tmp_path)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    assert len(before) == 4
    assert set(executions) == {part.number for part in plan.parts}
    assert {executions[part] for part in before} == {1}
    assert executions.total() <= len(plan.parts) + THREADS


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

"""Threads of this process as workers: who is called where, how they end, and what they leave behind."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dask.delayed import Delayed, delayed
from runs.merging import Killed, finished_parts, plan_merge, slowed

from mergemill.engine import run
from mergemill.engine.errors import MergemillError, RunError
from mergemill.engine.runs.crew import find_workplace, open_crew
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.runs.worker.process import set_up_process
from mergemill.engine.runs.worker.workers import Workers

TWO = Workers(0, 2, 64 << 20)


def make_task(function: Callable[..., object], *arguments: object) -> Delayed:
    """A task of `function`, or of the values that other tasks return."""
    return delayed(function, pure=False)(*arguments)


def test_each_result_comes_once_in_the_thread_that_asked() -> None:
    got: list[tuple[int, threading.Thread]] = []
    halves = [make_task(int, 10 * number) for number in range(50)]
    with open_crew(TWO) as crew:
        crew.run_tasks(
            [make_task(lambda half: half // 10, half) for half in halves],
            lambda result: got.append((result, threading.current_thread())),
        )
    assert sorted(result for result, _ in got) == list(range(50))  # and not what the tasks before them return
    assert {thread for _, thread in got} == {threading.current_thread()}


def test_a_crew_without_tasks_ends_at_once() -> None:
    with open_crew(TWO) as crew:
        crew.run_tasks([], pytest.fail)


def test_as_many_tasks_run_at_once_as_there_are_threads() -> None:
    both = threading.Barrier(2)
    with open_crew(TWO) as crew:
        crew.run_tasks([make_task(both.wait, 30) for _ in range(4)], lambda result: None)


def test_tasks_of_a_crew_share_its_workplace_and_no_other_crew_does() -> None:
    found: list[int] = []
    with open_crew(TWO) as crew, open_crew(Workers(0, 1, 32 << 20)) as other:
        for each in (crew, other, crew):
            each.run_tasks(
                [make_task(lambda: find_workplace().memory_bytes) for _ in range(3)], lambda size: found.append(size)
            )
    assert found == [64 << 20] * 3 + [32 << 20] * 3 + [64 << 20] * 3


def test_an_error_that_was_raised_on_purpose_is_the_runs() -> None:
    def fail() -> None:
        raise RunError("the disk is gone")

    with pytest.raises(RunError, match=r"^the disk is gone$"), open_crew(TWO) as crew:
        crew.run_tasks([make_task(fail)], pytest.fail)


def test_an_unforeseen_error_says_its_kind_and_keeps_its_cause() -> None:
    with pytest.raises(MergemillError) as caught, open_crew(TWO) as crew:
        crew.run_tasks([make_task(lambda: 1 // 0)], pytest.fail)
    assert str(caught.value).startswith("a task failed: ZeroDivisionError: ")
    assert str(caught.value).endswith("; run the same command again to resume")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_the_caller_is_not_taken_for_a_tasks() -> None:
    def refuse(result: object) -> None:
        raise KeyError(result)

    with pytest.raises(KeyError), open_crew(TWO) as crew:
        crew.run_tasks([make_task(int, 7)], refuse)


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_run_leaves_no_thread_behind_and_tasks_end_at_their_next_slab(end: str, family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", family, part_bytes=1 << 30)
    assert len(plan.parts) == 1
    cut = plan_merge("linear", family)
    before = set(threading.enumerate())

    def stop(event: Event) -> None:
        if end == "killed" and isinstance(event, PartFinished):
            raise Killed

    if end == "finished":
        run(plan, tmp_path / "out", workers=0, threads=2, on_event=stop)
    else:
        with slowed(0.05), pytest.raises(Killed):
            run(cut, tmp_path / "out", workers=0, threads=4, on_event=stop)
        assert len(finished_parts(tmp_path / "out")) == 1
    assert set(threading.enumerate()) == before


def test_a_task_that_still_runs_when_the_crew_goes_finds_it_being_stopped() -> None:
    seen: list[str] = []
    running = threading.Event()

    def work() -> None:
        place = find_workplace()
        running.set()
        while True:
            time.sleep(0.01)
            try:
                place.check_going()
            except RunError as error:
                seen.append(str(error))
                raise

    def fail() -> None:
        running.wait(30)
        raise RunError("first")

    with pytest.raises(RunError, match="first"), open_crew(TWO) as crew:
        crew.run_tasks([make_task(work), make_task(fail)], pytest.fail)
    assert seen == ["the worker is being stopped"]


# --- torch's threads ---


def test_torch_has_one_thread_in_tasks_and_its_own_number_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found: list[int] = []
        with open_crew(TWO) as crew:
            crew.run_tasks([make_task(torch.get_num_threads) for _ in range(4)], found.append)
        assert found == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_of_two_merges_at_once_the_last_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = set_up_process(), set_up_process()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


LATE = """
import sys
from mergemill.engine.runs.worker.process import set_up_process
from mergemill.engine.tensors.lazy import torch

with set_up_process():
    assert "torch" not in sys.modules
    inside = torch.get_num_threads()
import torch
print(inside, torch.get_num_threads(), len(__import__("os").sched_getaffinity(0)) > 1)
"""


def test_torch_that_the_first_task_loads_has_one_thread_from_the_start() -> None:
    # Dask leaves OMP_NUM_THREADS=1 and the like in the environment of whoever started worker processes.
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True, env=environ)
    inside, after, several = done.stdout.split()
    assert inside == "1"
    assert after != "1" or several == "False"


def test_torch_is_not_loaded_for_its_threads_sake() -> None:
    code = "import sys; from mergemill.engine.runs.worker import process\nwith process.set_up_process(): pass\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

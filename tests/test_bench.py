"""The benchmark: its simulation against schedules worked out by hand, and one tiny comparison from end to end."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from bench.simulate import Place, Task, find_end, simulate

FREE = Place(scheduler_s=0, message_s=0, latency_s=0, worker_rate=math.inf, store_rate=math.inf)
TWELVE = [Task(f"t{i}", (), 1.0, 0, 0) for i in range(12)]  # of a second each
MOVES = [Task(f"m{i}", (), 0.0, 100, 100) for i in range(10)]  # that read and write 100 bytes each
COMPARE = Path(__file__).with_name("bench") / "compare.py"


@pytest.mark.parametrize(("workers", "seconds"), [(1, 12), (2, 6), (5, 3), (12, 1), (64, 1)])
def test_independent_tasks_take_waves(workers: int, seconds: float) -> None:
    assert simulate(TWELVE, workers, FREE).seconds == seconds


def test_a_scheduler_hands_out_one_task_after_the_other() -> None:
    place = Place(scheduler_s=0.5, message_s=0, latency_s=0, worker_rate=math.inf, store_rate=math.inf)
    outcome = simulate(TWELVE, 64, place)
    assert outcome.seconds == 12 * 0.5 + 1
    assert outcome.reason == "the scheduler"


def test_a_chain_gains_nothing_from_workers() -> None:
    chain = [Task(f"c{i}", (f"c{i - 1}",) if i else (), 2.0, 0, 0) for i in range(5)]
    outcome = simulate(chain, 8, FREE)
    assert outcome.seconds == 10
    assert outcome.reason == "the longest chain of tasks"


def test_a_store_gives_all_workers_together_no_more_than_its_rate() -> None:
    place = Place(scheduler_s=0, message_s=0, latency_s=0, worker_rate=math.inf, store_rate=100.0)
    outcome = simulate(MOVES, 10, place)
    assert outcome.seconds == pytest.approx(20)
    assert outcome.reason == "the store"


def test_a_request_waits_for_its_latency() -> None:
    place = Place(scheduler_s=0, message_s=0, latency_s=0.5, worker_rate=100.0, store_rate=math.inf)
    assert simulate(MOVES, 1, place).seconds == pytest.approx(10 * 2 * (0.5 + 1))


def test_the_end_of_growth_is_named() -> None:
    outcomes = [simulate(TWELVE, workers, FREE) for workers in (1, 2, 4, 8)]
    assert find_end(outcomes).startswith("linear up to fewer than 8 workers; there held up by uneven shares")


def test_floors_read_and_write_what_a_merge_does(tmp_path: Path) -> None:
    """The kernel's own, io_uring, where the package is there."""
    sources = [tmp_path / "a", tmp_path / "b"]
    for source, size in zip(sources, (3_000_001, 9_000_000), strict=True):
        source.write_bytes(bytes(size))
    ways = ["after", "beside", *(["uring"] if find_spec("liburing") else [])]
    for way in ways:
        out = tmp_path / way
        command = [sys.executable, str(COMPARE.with_name("floor.py")), way, str(out), "5000003", *map(str, sources)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert (found["read_bytes"], found["written_bytes"]) == (12_000_001, 5_000_003)
        assert out.stat().st_size == 5_000_003


@pytest.mark.slow
def test_a_tiny_comparison_ends_with_a_verdict_for_each_target(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--shape", "tiny", "--runs", "1", "--programs", "floor,beside,mergemill", "--json", str(found)]
    options += ["--methods", "linear,ties-three,linear-fp8,ties-delta_base"]
    command = [sys.executable, str(COMPARE), *options, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| linear | floor (1) |" in done.stdout
    assert "| linear | mergemill (1) |" in done.stdout
    result = json.loads(found.read_text())
    assert list(result["runs"]) == ["linear", "ties-three", "linear-fp8", "ties-delta_base"]
    for floor, stricter, ours in result["runs"].values():
        assert floor["output_bytes"] == stricter["output_bytes"] == pytest.approx(ours["output_bytes"], rel=0.003)
        assert floor["usage"]["read_bytes"] == pytest.approx(stricter["usage"]["read_bytes"], rel=0.01)
    floor, _, ours = result["runs"]["linear"]
    assert floor["output_bytes"] == pytest.approx(ours["output_bytes"], rel=0.001)  # but for how headers are padded
    assert ours["usage"]["written_bytes"] >= ours["output_bytes"]
    assert ours["usage"]["peak_bytes"] > ours["usage"]["peak_private_bytes"] > floor["usage"]["peak_bytes"]
    assert len(result["targets"]) == 5 * 4 + 2
    assert [target["met"] for target in result["targets"][1:5]] == [None] * 4  # without mergekit
    assert list(tmp_path.iterdir()) == [found]

"""A merge that was killed, torn or damaged half way ends with the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs.merging import (
    Killed,
    finished_parts,
    flip_bit,
    hash_output,
    is_loadable,
    list_files,
    plan_merge,
    run_until,
    slowed,
)

from mergemill.engine import abort, run, verify
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.errors import CheckpointError, OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import running
from mergemill.engine.runs.events import Committed, Event, PartFinished, Started
from mergemill.engine.runs.outputs import folder, output
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.receipts import Journal
from mergemill.engine.storage.beneath import Beneath

TESTS = Path(__file__).parents[1]
METHOD = "slerp"  # a round of statistics, then the merge
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge(METHOD, family)


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an undisturbed merge."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan, out, workers=0, threads=2)
    return hash_output(out)


def resume(plan: Plan, out: Path, **options: Any) -> tuple[Committed, list[PartFinished]]:
    events: list[Event] = []
    committed = run(plan, out, on_event=events.append, **({"workers": 0, "threads": 2} | options))
    return committed, [event for event in events if isinstance(event, PartFinished)]


def start_driver(family: Path, out: Path, **wanted: Any) -> "subprocess.Popen[str]":
    spec = {"method": METHOD, "family": str(family), "out": str(out), "workers": 0, "threads": 1} | wanted
    return subprocess.Popen(
        [sys.executable, "-m", "runs.driver", json.dumps(spec)],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def driver(family: Path, out: Path, **wanted: Any) -> Iterator["subprocess.Popen[str]"]:
    process = start_driver(family, out, **wanted)
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_parts(process: "subprocess.Popen[str]", parts: int) -> None:
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith("PartFinished")
        if seen == parts:
            return
    pytest.fail(f"the driver ended after {seen} parts")


def wait_until(true: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def worker_pids() -> set[int]:
    """The processes that this one's clusters have started to work in."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if any("spawn_main" in word for word in child.cmdline())}


def test_a_worker_killed_half_way_changes_nothing(family: Path, tmp_path: Path) -> None:
    """With TIES, whose rounds of statistics the killed worker may have held."""
    plan = plan_merge("ties", family)
    run(plan, tmp_path / "expected", workers=0, threads=2)
    killed: list[int] = []
    seen: list[int] = []
    merged_after: list[int] = []

    def kill_one(event: Event) -> None:
        if isinstance(event, Started):
            seen.extend(sorted(worker_pids()))
        if isinstance(event, PartFinished):
            if event.parts_done == 5:
                killed.append(seen[0])
                os.kill(seen[0], signal.SIGKILL)
            elif killed:
                merged_after.append(event.receipt.part)

    with slowed(0.02):
        committed = run(plan, tmp_path / "out", workers=2, on_event=kill_one)
    assert len(seen) == 2
    assert killed
    assert len(merged_after) > 10
    assert committed.redone_parts == len(plan.parts)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "expected")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_driver_killed_half_way_leaves_what_a_resume_finishes(
    workers: int, plan: Plan, family: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with driver(family, out, workers=workers, slow_s=0.05) as process:
        wait_for_parts(process, 6)
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        assert process.wait() == -signal.SIGKILL
    held = set(finished_parts(out))
    assert 6 <= len(held) < len(plan.parts) - 5
    assert not is_loadable(out)
    assert len(pids) >= workers
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids)), "workers outlive their driver"

    committed, parts = resume(plan, out)
    assert committed.redone_parts == len(plan.parts) - len(held)
    assert {event.receipt.part for event in parts if event.kept} == held
    assert sorted(finished_parts(out)) == list(range(len(plan.parts))), "each part has one receipt"
    assert hash_output(out) == expected


@pytest.mark.parametrize("rename", [1, 3])
def test_a_driver_killed_between_the_renames_of_its_commit_leaves_what_a_resume_finishes(
    rename: int, family: Path, tmp_path: Path
) -> None:
    plan = plan_merge(METHOD, family, shard_size="700KB")
    assert len(plan.shards) > 3
    run(plan, tmp_path / "expected", workers=0, threads=2)
    out = tmp_path / "out"
    with driver(family, out, shard_size="700KB", die_at_rename=rename) as process:
        assert process.wait() == -signal.SIGKILL
    assert len(list(out.glob("*.safetensors"))) == rename - 1
    assert not is_loadable(out)
    committed, _ = resume(plan, out)
    assert committed.redone_parts == 0
    assert hash_output(out) == hash_output(tmp_path / "expected")


@contextmanager
def dying_in_commit(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[Counter[str]]:
    """End the driver before the `step`-th of the commit's writes; yields what was done."""
    done: Counter[str] = Counter()

    def guard(place: Any, name: str) -> None:
        function = getattr(place, name)

        def guarded(*args: Any, **options: Any) -> Any:
            if sum(done.values()) == step:
                raise Killed
            done[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(place, name, guarded)

    commit = output.commit_output

    def commit_guarded(*args: Any) -> None:
        for place, name in [
            (folder, "rename_file"),
            (folder, "sync_folder"),
            (Beneath, "write"),
            (Journal, "append_commit"),
        ]:
            guard(place, name)
        commit(*args)

    monkeypatch.setattr(running, "commit_output", commit_guarded)
    yield done


def test_a_commit_may_end_before_any_of_its_steps_and_is_a_whole_model_or_none(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", family, part_bytes=1 << 20, shard_size="1MB")
    run(plan, tmp_path / "expected", workers=0, threads=2)
    steps = len(plan.shards) + 1 + len(plan.files) + 3  # plan and driver that tell no more where, and the mark
    assert steps > 8
    for step in range(steps):
        out = tmp_path / f"out-{step}"
        with pytest.MonkeyPatch.context() as patch, dying_in_commit(patch, step) as done, pytest.raises(Killed):
            run(plan, out, workers=0, threads=2)
        assert sum(done.values()) == step
        assert is_loadable(out) == (step >= steps - 3), "the index is the last of the model"
        with pytest.raises(CheckpointError, match="holds a merge that is not finished; run the same merge again"):
            open_checkpoint(str(out))
        assert load_with_transformers(out) in ([plan.tensors] if step >= steps - 3 else [0])
        if (out / "config.json").exists():  # by which some loaders take whatever shards there are
            assert all((out / shard.name).exists() for shard in plan.shards)
        committed, _ = resume(plan, out)
        assert committed.redone_parts == 0
        assert hash_output(out) == hash_output(tmp_path / "expected")
        assert len(open_checkpoint(str(out)).tensors) == plan.tensors


def load_with_transformers(out: Path) -> int:
    """Return how many tensors transformers finds in a folder, all of its model's; 0 where it loads nothing."""
    transformers = pytest.importorskip("transformers")
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    except (OSError, ValueError):
        return 0
    assert not told["missing_keys"]
    return len(model.state_dict())


def test_a_torn_last_line_of_the_journal_counts_as_no_receipt(
    plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 7)
    journal = out / ".mergemill" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert len(finished_parts(out)) == 6
    committed, _ = resume(plan, out)
    assert committed.redone_parts == len(plan.parts) - 6
    assert len(finished_parts(out)) == len(plan.parts), "the torn line swallowed no other"
    assert hash_output(out) == expected
    assert verify(out).parts == len(plan.parts)


def test_a_part_damaged_before_the_resume_is_merged_again(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 9)
    damaged = finished_parts(out)[4]
    (shard,) = (out / ".mergemill").glob("*.tmp-*")
    flip_bit(shard, (plan.parts[damaged].start_bytes + plan.parts[damaged].stop_bytes) // 2)
    committed, parts = resume(plan, out)
    assert committed.redone_parts == len(plan.parts) - 8
    assert damaged in {event.receipt.part for event in parts if not event.kept}
    assert hash_output(out) == expected
    assert verify(out).parts == len(plan.parts)


def test_a_header_lost_before_the_resume_is_written_again(plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    """As after a power cut: the file has its size, but its first page never reached the disk."""
    out = tmp_path / "out"
    run_until(plan, out, 3)
    (shard,) = (out / ".mergemill").glob("*.tmp-*")
    with open(shard, "r+b") as file:
        file.write(bytes(len(plan.shards[0].header)))
    resume(plan, out)
    assert hash_output(out) == expected


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_an_unfinished_shard_lost_before_the_resume_is_merged_again(damage: str, family: Path, tmp_path: Path) -> None:
    plan = plan_merge(METHOD, family, shard_size="700KB")
    run(plan, tmp_path / "expected", workers=0, threads=2)
    out = tmp_path / "out"
    run_until(plan, out, len(plan.parts) - 1)
    lost = plan.shards[2].name
    kept = [part for part in finished_parts(out) if plan.shards[plan.parts[part].shard].name != lost]
    path = FolderOutput(out).unfinished(lost, plan.digest)
    if damage == "removed":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    committed, _ = resume(plan, out)
    assert committed.redone_parts == len(plan.parts) - len(kept)
    assert 0 < committed.redone_parts < len(plan.parts)
    assert hash_output(out) == hash_output(tmp_path / "expected")


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_shard_damaged_in_an_interrupted_commit_never_becomes_part_of_a_checkpoint(
    damage: str, family: Path, tmp_path: Path
) -> None:
    plan = plan_merge(METHOD, family, shard_size="700KB")
    run(plan, tmp_path / "expected", workers=0, threads=2)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, dying_in_commit(patch, 3), pytest.raises(Killed):
        run(plan, out, workers=0, threads=2)
    damaged = out / plan.shards[1].name
    if damage == "removed":
        damaged.unlink()
    else:
        os.truncate(damaged, damaged.stat().st_size - 1)
        with pytest.raises(OutputError, match="appeared while the merge ran; move it away"):
            resume(plan, out)
        assert not is_loadable(out)
        damaged.rename(tmp_path / "away")
    committed, _ = resume(plan, out)
    assert committed.redone_parts == sum(part.shard == 1 for part in plan.parts)
    assert hash_output(out) == hash_output(tmp_path / "expected")


def test_a_merge_is_resumed_with_other_workers_memory_and_slabs(
    plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 10)
    committed, _ = resume(plan, out, workers=1, threads=2, memory="64MiB", slab=1 << 16)
    assert committed.redone_parts == len(plan.parts) - 10
    assert hash_output(out) == expected


def test_a_finished_merge_is_not_run_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(plan, out, workers=0, threads=2)
    before = list_files(out)
    monkeypatch.delattr(running, "open_crew")  # no worker is started
    committed, parts = resume(plan, out)
    assert (committed.redone_parts, committed.read_bytes, parts) == (0, 0, [])
    assert committed.parts == len(plan.parts)
    assert list_files(out) == before


def test_a_finished_merge_that_lost_a_file_says_which(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan, out, workers=0, threads=2)
    (out / "config.json").unlink()
    with pytest.raises(running.RunError, match=r"config\.json is gone; merge again with --overwrite"):
        run(plan, out)


def test_of_two_drivers_the_second_is_refused(
    plan: Plan, family: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with driver(family, out, slow_s=0.03) as process:
        wait_for_parts(process, 3)
        for refused in (lambda: run(plan, out, workers=0), lambda: abort(out)):
            with pytest.raises(OutputError, match="another mergemill is writing here; wait for it or stop it"):
                refused()
        assert process.wait(60) == 0
    assert hash_output(out) == expected


def test_a_driver_that_waited_at_the_door_finds_the_other_merge(
    plan: Plan, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers find the folder empty; one merges all it has before the other takes the lock."""
    out = tmp_path / "out"
    other = plan_merge("linear", family)
    opened = running.open_output

    def open_and_wait(folder: Path, wanted: Plan, *more: Any, **options: Any) -> FolderOutput:
        found = opened(folder, wanted, *more, **options)
        monkeypatch.setattr(running, "open_output", opened)
        run(other, out, workers=0)
        return found

    monkeypatch.setattr(running, "open_output", open_and_wait)
    with pytest.raises(OutputError, match="holds another merge, which differs in the recipe"):
        run(plan, out, workers=0)
    assert verify(out).digest == other.digest


def test_threads_that_run_into_one_folder_leave_one_whole_merge(
    plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    errors: list[OutputError] = []

    def attempt() -> None:
        try:
            run(plan, out, workers=0, threads=1)
        except OutputError as error:
            errors.append(error)

    threads: Sequence[threading.Thread] = [threading.Thread(target=attempt) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another mergemill is writing here" in str(error) for error in errors)
    assert hash_output(out) == expected

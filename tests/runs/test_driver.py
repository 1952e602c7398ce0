"""Merges that others look at, watch and end, by what lies beside the output: a folder, or a prefix in S3."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import new_place, put_family
from runs.merging import finished_parts, hash_output, is_loadable, plan_merge, slowed
from servers.s3 import S3

from mergemill.cli.status import say_resume
from mergemill.engine import attach, cancel, run, status
from mergemill.engine.errors import Cancelled, MergeError, OutputError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import driver as driver_module
from mergemill.engine.runs import running
from mergemill.engine.runs.driver import Driving, find_request, is_alive, read_driver, request_cancel
from mergemill.engine.runs.events import Committed, Event, PartFinished, Started
from mergemill.engine.runs.outputs import checksum, folder
from mergemill.engine.runs.outputs.lease import OLD_S
from mergemill.engine.runs.outputs.notes import FileNotes
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.storage.beneath import Beneath
from mergemill.engine.storage.ranges import Pin

WAIT_S = 60.0
SLOW_S = 0.15  # a slab


@contextmanager
def merging_slowly(
    plan: Plan, out: str | Path, slow_s: float = SLOW_S, **options: Any
) -> Iterator["Future[Committed]"]:
    """Merge slowly in another thread while the block lasts, which begins once two parts are done."""
    ended: Future[Committed] = Future()
    two_done = threading.Event()

    def look(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done >= 2:
            two_done.set()

    def merge() -> None:
        try:
            ended.set_result(run(plan, out, on_event=look, **{"workers": 0, "threads": 1, **options}))
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            ended.set_exception(error)

    with slowed(slow_s):
        thread = threading.Thread(target=merge)
        thread.start()
        try:
            assert two_done.wait(WAIT_S)
            yield ended
        finally:
            thread.join()


def cancel_half_way(plan: Plan, out: Path) -> None:
    """Leave a merge of which some parts are done."""
    with merging_slowly(plan, out) as ended:
        cancel(out, wait_s=WAIT_S)
        with pytest.raises(Cancelled):
            ended.result()


@pytest.fixture(params=["folder", "seaweed"])
def place(
    request: pytest.FixtureRequest, family: Path, tmp_path: Path
) -> tuple[Plan, str, Callable[[], dict[str, str]]]:
    """A plan, where it is merged to, and what lies there by name: its sha256."""
    if request.param == "folder":
        return plan_merge("ties", family), str(tmp_path / "out"), lambda: hash_output(tmp_path / "out")
    server: S3 = request.getfixturevalue("seaweed")
    out = new_place(server)
    plan = plan_merge("ties", put_family(server, family).url, part_bytes=5 << 20, shard_size="tensor")
    return plan, out.url, out.hash


def test_a_running_merge_is_seen_cancelled_and_resumed_to_the_same_bytes(
    place: tuple[Plan, str, Callable[[], dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, hash_there = place
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    with merging_slowly(plan, out) as ended:
        time.sleep(1.1)  # of S3: receipts are there a second later
        seen = status(out)
        assert (seen.state, seen.digest, seen.parts) == ("running", plan.digest, len(plan.parts))
        assert 1 <= seen.parts_done < seen.parts
        assert 0 < seen.done_bytes < seen.write_bytes == sum(part.size_bytes for part in plan.parts)
        assert seen.driver is not None
        assert (seen.driver.pid, seen.driver.host, seen.driver.job) == (os.getpid(), os.uname().nodename, "slurm 1234")
        assert seen.driver.started is not None
        assert seen.seen_s is not None
        assert seen.seen_s < OLD_S
        began_s = time.monotonic()
        left = cancel(out, wait_s=WAIT_S)
        assert time.monotonic() - began_s < 20
        with pytest.raises(Cancelled, match=f"^cancelled by .* on {os.uname().nodename}$"):
            ended.result()
    assert left.state == "unfinished"
    assert seen.parts_done <= left.parts_done < left.parts
    assert left.driver is not None
    assert (left.driver.how, left.driver.token) == ("cancelled", seen.driver.token)
    assert find_output(out).notes.read("cancel") is None
    resume = shlex.split(say_resume(replace(left, out="relative")))
    assert resume[:5] == ["cd", str(Path.cwd()), "&&", "mergemill", "merge"]
    assert resume[6] == str(Path.cwd() / "relative")
    assert shlex.split(say_resume(replace(left, out="s3://bucket/out")))[6] == "s3://bucket/out"

    done = run(plan, out, workers=0, threads=2)
    assert 0 < done.redone_parts <= len(plan.parts) - left.parts_done
    assert status(out).state == "finished"
    run(plan, tmp_path / "expected", workers=0, threads=2)
    assert hash_there() == hash_output(tmp_path / "expected")
    with pytest.raises(OutputError, match="is finished, so there is nothing to cancel"):
        cancel(out)


def test_processes_are_cancelled_too(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("dare_linear", family)
    with merging_slowly(plan, tmp_path / "out", workers=1) as ended:
        assert cancel(tmp_path / "out", wait_s=WAIT_S).state == "unfinished"
        with pytest.raises(Cancelled):
            ended.result()
    assert finished_parts(tmp_path / "out")
    assert not is_loadable(tmp_path / "out")


def test_a_request_that_nobody_saw_cancels_no_later_run(family: Path, tmp_path: Path) -> None:
    plan, out = plan_merge("linear", family), tmp_path / "out"
    with merging_slowly(plan, out) as ended:
        earlier = status(out).driver
        assert earlier is not None
        cancel(out, wait_s=WAIT_S)
        assert isinstance(ended.exception(), Cancelled)
    notes = FileNotes(Beneath(out), ".mergemill")
    with merging_slowly(plan, out) as ended:
        request_cancel(notes, earlier, "somebody late")  # as if it had been written a moment before
        time.sleep(3 * driver_module.LOOK_S / 2)
        assert status(out).state in ("running", "finished")
    assert ended.result().parts == len(plan.parts)


def test_who_watches_sees_the_events_of_the_merge(
    place: tuple[Plan, str, Callable[[], dict[str, str]]],
) -> None:
    plan, out, _ = place
    events: list[Event] = []
    with merging_slowly(plan, out, slow_s=0.02) as ended:
        committed = attach(out, on_event=events.append)
    assert committed == ended.result()
    assert isinstance(events[0], Started)
    assert (events[0].digest, events[0].parts) == (plan.digest, len(plan.parts))
    parts = [event for event in events if isinstance(event, PartFinished)]
    assert sorted(event.receipt.part for event in parts) == list(range(len(plan.parts)))
    assert [event.parts_done for event in parts] == list(range(1, len(plan.parts) + 1))
    assert parts[-1].done_bytes == sum(part.size_bytes for part in plan.parts)
    assert not parts[-1].kept
    assert events[-1] == committed
    again = attach(out)
    assert (again.digest, again.redone_parts) == (plan.digest, 0)


def test_who_watches_a_merge_that_is_cancelled_or_fails_is_told_why(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_merge("linear", family), tmp_path / "out"
    with merging_slowly(plan, out) as ended:
        threading.Timer(0.5, cancel, (out,)).start()
        with pytest.raises(RunError, match=r"process \d+ of .* ended, cancelled: cancelled by .*resume$"):
            attach(out)
        assert isinstance(ended.exception(), Cancelled)

    def fail(*_: object) -> None:
        raise MergeError("no such luck")

    monkeypatch.setattr(running, "commit_output", fail)
    with (
        merging_slowly(plan, out, slow_s=0.01),
        pytest.raises(RunError, match="ended, failed: no such luck; run the merge again"),
    ):
        attach(out)


@pytest.fixture
def killed(family: Path, tmp_path: Path) -> tuple[Path, int]:
    """An output whose driver was killed with SIGKILL, and that driver's number."""
    out = tmp_path / "out"
    wanted = {"method": "linear", "family": str(family), "out": str(out), "workers": 0, "threads": 1, "slow_s": SLOW_S}
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "runs.driver", json.dumps(wanted)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "PartFinished\n":
            assert process.poll() is None
        assert status(out).state == "running"
        process.send_signal(signal.SIGKILL)
    return out, process.pid


def test_a_killed_driver_is_told_at_once_on_its_machine(killed: tuple[Path, int]) -> None:
    out, pid = killed
    seen = status(out)
    assert seen.state == "unfinished"
    assert seen.driver is not None
    assert (seen.driver.pid, seen.driver.ended) == (pid, None)
    assert seen.seen_s is not None
    with pytest.raises(OutputError, match="nobody drives this merge, so there is nothing to cancel"):
        cancel(out)
    with pytest.raises(RunError, match=f"process {pid} of .* is gone without a word"):
        attach(out)


def test_a_killed_driver_is_told_on_another_machine_once_it_is_silent(
    killed: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = killed
    monkeypatch.setattr(driver_module, "name_processes", lambda: "another machine")
    assert status(out).state == "running"  # as far as can be seen from there
    with pytest.raises(RunError, match=r"has not ended in 0\.6 s; it is asked to"):
        cancel(out, wait_s=0.6)
    assert status(out).state == "cancelling"
    silent_since = time.time() - OLD_S - 1
    os.utime(out / ".mergemill" / "lock", (silent_since, silent_since))
    assert status(out).state == "unfinished"


def test_the_lock_of_a_running_merge_stays_young(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "RENEW_S", 0.1)
    with merging_slowly(plan_merge("linear", family), tmp_path / "out", slow_s=0.05) as ended:
        lock = tmp_path / "out" / ".mergemill" / "lock"
        os.utime(lock, (0, 0))
        time.sleep(0.5)
        assert time.time() - lock.stat().st_mtime < 5
    assert ended.result()


def test_a_disk_that_fails_once_leaves_the_lock_young(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "RENEW_S", 0.1)
    utime, failed = os.utime, list[int]()

    def fail_once(*given: Any) -> None:
        if isinstance(given[0], int) and not failed:
            failed.append(given[0])
            raise OSError(errno.ESTALE, "Stale file handle")
        utime(*given)

    monkeypatch.setattr(os, "utime", fail_once)
    with merging_slowly(plan_merge("linear", family), tmp_path / "out", slow_s=0.05):
        lock = tmp_path / "out" / ".mergemill" / "lock"
        utime(lock, (0, 0))
        end_s = time.monotonic() + WAIT_S
        while not failed or lock.stat().st_mtime < 1:
            assert time.monotonic() < end_s
            time.sleep(0.05)


def test_a_part_of_a_file_that_others_still_write_into_is_merged_again(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a task of a driver that was killed, on somebody's cluster: no source has changed."""
    plan, out = plan_merge("linear", family), tmp_path / "out"
    cancel_half_way(plan, out)
    read_into, times = checksum.read_into, list[float]()

    def read_while_others_write(pin: Pin, start: int, buffer: Any, *more: Any) -> None:
        times.append(time.time() - 1000 + len(times))
        os.utime(pin.url, (times[-1], times[-1]))
        read_into(pin, start, buffer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(checksum, "read_into", read_while_others_write)
        committed = run(plan, out, workers=0, threads=1)
    assert times
    assert committed.redone_parts == len(plan.parts)
    run(plan, tmp_path / "expected", workers=0)
    assert hash_output(out) == hash_output(tmp_path / "expected")


def test_a_driver_that_another_has_replaced_says_nothing_more(tmp_path: Path) -> None:
    notes = FileNotes(Beneath(tmp_path), ".")
    first, second = Driving(notes, ""), Driving(notes, "")
    first.begin()
    second.begin()  # as when the first slept for long
    after = read_driver(notes)
    assert after is not None
    request_cancel(notes, after, "somebody")
    first.end(OutputError("another mergemill has begun to write here"))
    assert read_driver(notes) == after
    assert find_request(notes, after.token) == "somebody"
    second.end(None)
    ended = read_driver(notes)
    assert ended is not None
    assert (ended.how, notes.read("cancel")) == ("finished", None)


def test_a_driver_that_another_has_replaced_ends_soon(
    place: tuple[Plan, str, Callable[[], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, _ = place
    monkeypatch.setattr(driver_module, "LOOK_S", 0.05)
    with merging_slowly(plan, out) as ended:
        after = Driving(find_output(out).notes, "")
        after.begin()
        with pytest.raises(OutputError, match="another mergemill has begun to write here"):
            ended.result(timeout=10)
    assert read_driver(find_output(out).notes) == after._driver


def test_a_request_that_stopped_nothing_hides_no_error(tmp_path: Path) -> None:
    """As one that comes while the output is being committed."""
    driving, full = Driving(FileNotes(Beneath(tmp_path), "."), ""), OSError(errno.ENOSPC, "disk full")
    driving.begin()
    driving._end_by(Cancelled("cancelled by somebody"))
    assert driving.end(full) is full


def test_a_driver_whose_lease_is_gone_does_not_run(tmp_path: Path, killed: tuple[Path, int]) -> None:
    """As after an end that nobody could write down."""
    out, _ = killed
    driver = read_driver(find_output(out).notes)
    assert driver is not None
    elsewhere = replace(driver, processes="another machine")
    assert is_alive(elsewhere, find_output(out).notes.get_age("lock"))
    (out / ".mergemill" / "lock").unlink()
    assert not is_alive(elsewhere, find_output(out).notes.get_age("lock"))


def test_a_merge_by_threads_is_cancelled_while_its_receipts_are_checked(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_merge("linear", family), tmp_path / "out"
    cancel_half_way(plan, out)
    monkeypatch.setattr(driver_module, "LOOK_S", 0.01)
    asked, read_into = list[int](), checksum.read_into

    def read_slowly(pin: Pin, start: int, buffer: Any, *more: Any) -> None:
        driver = read_driver(find_output(out).notes)
        assert driver is not None
        request_cancel(find_output(out).notes, driver, "somebody")
        asked.append(start)
        time.sleep(0.5)
        read_into(pin, start, buffer, *more)

    monkeypatch.setattr(checksum, "read_into", read_slowly)
    with pytest.raises(Cancelled, match=r"^cancelled by somebody$"):
        run(plan, out, workers=0, threads=1)
    assert len(asked) == 1


@pytest.mark.parametrize("command", [status, cancel, attach])
def test_where_no_merge_is_nothing_is_looked_at_or_made(command: Callable[..., object], tmp_path: Path) -> None:
    for out in (tmp_path / "absent", tmp_path):
        with pytest.raises(OutputError, match=f"^{out}: holds no merge$"):
            command(out)
    assert list(tmp_path.iterdir()) == []


def test_watching_may_begin_before_the_merge(family: Path, tmp_path: Path) -> None:
    plan, out = plan_merge("linear", family), tmp_path / "out"
    later = threading.Timer(0.5, run, (plan, out), {"workers": 0, "threads": 1})
    later.start()
    assert attach(out, wait_s=WAIT_S).digest == plan.digest
    later.join()

"""The commands that look at a merge of another process, watch it and end it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine import attach, status
from mergemill.engine.runs.driver import LOOK_S

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def paused(models: Path, tmp_path: Path, start: Start) -> "subprocess.Popen[str]":
    """A merge into `out` that has done ten parts, and goes on when what it prints is read."""
    arguments = ("merge", "ties.yml", tmp_path / "out", "--shard-size", "tensor", "--seed", 7, "--json")
    process = start(*arguments, cwd=models)
    assert process.stdout is not None
    while json.loads(process.stdout.readline()).get("parts_done") != 10:
        pass
    return process


def test_status_says_who_drives_and_cancel_ends_it_as_ctrl_c_does(
    paused: "subprocess.Popen[str]", mergemill: Run, models: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "out"
    code, said, err = mergemill("status", out)
    assert (code, err) == (0, "")
    assert re.match(rf"{out}: running, \d+ of 111 parts \(.* of .*\)", said)
    assert re.search(rf"driver +process {paused.pid} of {os.uname().nodename}, since .* UTC, last seen \d s ago", said)
    assert f"mergemill attach {out}" in said
    assert f"mergemill cancel {out}" in said

    canceller = start("cancel", out, cwd=models)
    wait_for(lambda: status(out).state == "cancelling")
    time.sleep(1.5 * LOOK_S)  # it prints, and does not merge, until it is read
    rest, err = paused.communicate(timeout=60)
    assert paused.returncode == 130
    assert re.fullmatch(r"mergemill: cancelled by .* after \d+ of 111 parts; go on with: mergemill merge .*\n", err)
    assert json.loads(rest.splitlines()[-1])["exit_code"] == 130
    told, err = canceller.communicate(timeout=60)
    assert (canceller.returncode, err) == (0, "")
    assert re.match(rf"{out}: cancelled, \d+ of 111 parts", told)
    resume = f"cd {models} && mergemill merge ties.yml {out} --shard-size tensor --seed 7 --json"
    assert told.endswith(f"go on with: {resume}\n")

    code, said, _ = mergemill("status", out)
    assert code == 0
    assert re.search(r"ended +.* UTC, cancelled: cancelled by ", said)
    assert f"mergemill abort {out}" in said
    code, said, _ = mergemill("status", out, "--json")
    found = json.loads(said)
    assert (found["state"], found["parts"], found["driver"]["pid"]) == ("unfinished", 111, paused.pid)


def test_what_status_says_resumes_from_any_directory(
    mergemill: Run, models: Path, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "it's here", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "ties.yml").write_text((models / "ties.yml").read_text().replace("./", f"{models}/"))
    (folder / "two.yml").write_text("{kind: local, workers: 2}")
    process = start("merge", "ties.yml", "out", "--cluster=two.yml", "--shard-size", "tensor", "--json", cwd=folder)
    assert process.stdout is not None
    while json.loads(process.stdout.readline()).get("parts_done") != 10:
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    monkeypatch.chdir(elsewhere)
    _, said, _ = mergemill("status", folder / "out")
    (resume,) = re.findall(r"^resume +(.*)$", said, re.MULTILINE)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    done = subprocess.run(["bash", "-c", resume], capture_output=True, text=True, check=True, timeout=120)
    assert 0 < json.loads(done.stdout.splitlines()[-1])["redone_parts"] <= 111 - 10
    assert status(folder / "out").state == "finished"
    assert list(elsewhere.iterdir()) == []


def test_attach_shows_the_progress_and_the_result_of_a_merge_elsewhere(
    paused: "subprocess.Popen[str]", models: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "out"
    watchers = [start("attach", out, cwd=models), start("attach", out, "--json", cwd=models)]
    time.sleep(2)
    driver = threading.Thread(target=paused.communicate)
    driver.start()
    said, err = watchers[0].communicate(timeout=60)
    events = [json.loads(line) for line in watchers[1].communicate(timeout=60)[0].splitlines()]
    driver.join()
    assert [watcher.returncode for watcher in watchers] == [paused.returncode, 0] == [0, 0]
    assert said.startswith(f"{out}: ")
    assert f"check it with: mergemill verify {out}" in said
    assert "1 worker of " in err
    assert [event["event"] for event in events] == ["started", *["part"] * 111, "committed"]
    assert {event["receipt"]["part"] for event in events[1:-1]} == set(range(111))


def test_ctrl_c_detaches_and_the_merge_goes_on(
    paused: "subprocess.Popen[str]", models: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "out"
    watcher = start("attach", out, "--json", cwd=models)
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["event"] == "started"
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 130
    assert err == f"mergemill: interrupted; the merge goes on: mergemill status {out}\n"
    assert status(out).state == "running"
    paused.communicate(timeout=60)
    assert attach(out).parts == 111


def test_attach_ends_with_the_driver_and_says_why(
    paused: "subprocess.Popen[str]", models: Path, tmp_path: Path, start: Start
) -> None:
    watcher = start("attach", tmp_path / "out", cwd=models)
    paused.send_signal(signal.SIGTERM)
    paused.communicate(timeout=60)
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 1
    assert re.search(rf"error: .*out: process {paused.pid} of .* ended, interrupted: terminated; run the merge", err)


@pytest.mark.parametrize("command", ["status", "cancel", "attach"])
def test_where_no_merge_is_the_code_is_two(mergemill: Run, tmp_path: Path, command: str) -> None:
    code, out, err = mergemill(command, tmp_path)
    assert (code, out, err) == (2, "", f"mergemill: error: {tmp_path}: holds no merge\n")


def wait_for(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def test_a_replacement_that_was_killed_is_told_as_such_and_goes_on(
    mergemill: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    assert mergemill("merge", "ties.yml", out, "-q")[0] == 0
    for step, left in enumerate(("whole", "removed in part")):
        arguments = ["merge", "ties.yml", str(out), "--seed", "7", "--overwrite", "--memory", "600MiB"]
        killed = subprocess.run([sys.executable, "-c", _KILL, str(step), *arguments], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        code, said, _ = mergemill("status", out)
        assert re.match(f"{out}: unfinished\nthere +a finished merge, {left}, which this one replaces\n", said)
        code, _, err = mergemill("attach", out)
        assert code == 1
        assert f"as if killed; the finished merge there, which it replaces, is {left}; run it again" in err
    (resume,) = re.findall(r"^resume +(.*)$", said, re.MULTILINE)
    assert "--overwrite" in resume
    code, said, _ = mergemill("abort", out)
    assert said.startswith(f"{out}: the unfinished merge is removed, ")
    assert not out.exists()


_KILL = """
import os, sys
from mergemill.cli.main import main
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.storage.beneath import Beneath

left, clear, remove = [int(sys.argv.pop(1))], FolderOutput.clear, Beneath.remove

def remove_or_die(self, name):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    remove(self, name)

def clear_and_die(self, plan):
    Beneath.remove = remove_or_die
    clear(self, plan)

FolderOutput.clear = clear_and_die
main()
"""

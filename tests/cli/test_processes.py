"""The command as a process: signals, resuming, pipes, terminals, start-up."""

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]


def read_until_part(process: "subprocess.Popen[str]", parts: int) -> None:
    """Read events until so many parts are finished."""
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("parts_done") == parts:
            return
    pytest.fail("the merge ended too early")


@pytest.mark.parametrize(
    ("number", "code", "word", "workers"),
    [
        (signal.SIGINT, 130, "interrupted", 0),
        (signal.SIGTERM, 143, "terminated", 0),
        (signal.SIGINT, 130, "interrupted", 2),
    ],
)
def test_signal_stops_cleanly_and_the_command_it_names_resumes(
    models: Path, tmp_path: Path, start: Start, number: int, code: int, word: str, workers: int
) -> None:
    out = tmp_path / "an out"
    arguments = ["merge", "ties.yml", out, "--shard-size", "tensor", "--workers", workers, "--json"]
    process = start(*arguments, cwd=models)
    read_until_part(process, 10)
    os.killpg(process.pid, number)  # as a terminal does: the workers get it as well
    rest, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.fullmatch(rf"mergemill: {word} after \d+ of 111 parts; go on with: mergemill .*\n", err)
    assert json.loads(rest.splitlines()[-1])["exit_code"] == code
    assert not (out / "model.safetensors.index.json").exists()

    resume = shlex.split(err.partition("go on with: mergemill ")[2])
    assert resume == [str(argument) for argument in arguments]
    process = start(*resume, cwd=models)
    done, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    committed = json.loads(done.splitlines()[-1])
    assert 0 < committed["redone_parts"] <= 111 - 10
    assert (out / "model.safetensors.index.json").exists()


def test_interrupted_merge_is_inspected_and_aborted(models: Path, tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    process = start("merge", "ties.yml", out, "--shard-size", "tensor", "--json", cwd=models)
    read_until_part(process, 10)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    shown, _ = start("inspect", out, cwd=models).communicate(timeout=60)
    assert re.search(r"merge, unfinished: \d+ of 111 parts", shown)
    process = start("abort", out, cwd=models)
    shown, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "freed" in shown
    assert not out.exists()


def test_signal_before_any_work_ends_at_once(models: Path, tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a scheduler that says nothing, so that the command waits
        silent.settimeout(60)
        place = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        process = start("merge", "ties.yml", tmp_path / "out", "--scheduler", place, cwd=models)
        silent.accept()[0].close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch("mergemill: interrupted.*\n", err.splitlines(keepends=True)[-1])
    assert "Traceback" not in err


def test_closed_pipe_is_no_traceback(models: Path, start: Start) -> None:
    process = start("inspect", "base", "--tensors", cwd=models)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_unforeseen_error_asks_to_be_reported(models: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "yaml.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    process = start("plan", "ties.yml", cwd=models, PYTHONPATH=str(tmp_path))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("mergemill: error: RuntimeError: first line second line; ")
    assert "MERGEMILL_DEBUG=1" in err
    assert err.count("\n") == 1
    process = start("plan", "ties.yml", cwd=models, PYTHONPATH=str(tmp_path), MERGEMILL_DEBUG="1")
    _, err = process.communicate(timeout=60)
    assert "Traceback" in err


def test_terminal_gets_a_bar(models: Path, tmp_path: Path, start: Start) -> None:
    ours, theirs = pty.openpty()
    look = {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    process = start("merge", "ties.yml", tmp_path / "out", cwd=models, stderr=theirs, **look)
    os.close(theirs)
    shown = read_terminal(ours).decode()
    assert process.wait() == 0
    assert " parts" in shown
    assert "\x1b[3" not in shown  # NO_COLOR


def read_terminal(descriptor: int) -> bytes:
    """Read what a terminal shows until its other end is closed."""
    shown = b""
    try:
        while data := os.read(descriptor, 1 << 16):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(descriptor)
    return shown


def test_help_imports_nothing_heavy(tmp_path: Path, start: Start) -> None:
    process = start("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    out, err = process.communicate(timeout=60)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in err.splitlines()}
    assert "Commands:" in out
    assert "typer" in imported
    assert not imported & {"torch", "dask", "distributed", "numpy", "pydantic"}
    # The engine refuses a system that it does not run on before anything else is imported.
    ours = {line.rpartition("|")[2].strip() for line in err.splitlines() if "mergemill.engine" in line}
    assert ours == {"mergemill.engine", "mergemill.engine.errors"}

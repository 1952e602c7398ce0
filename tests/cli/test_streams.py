"""Standard streams that are closed, full or read by nobody, and what the system refuses."""

import errno
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import write_llama

from mergemill.cli.console import explain
from mergemill.engine import verify
from mergemill.engine.errors import StorageError
from mergemill.engine.storage.local import pin_file, read_into

COMMAND = (sys.executable, "-c", "from mergemill.cli.main import main; main()")
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe, and its model beside it."""
    write_llama(tmp_path / "a", layers=1, hidden=16, intermediate=16, vocab=32, seed=0)
    path = tmp_path / "recipe.yml"
    path.write_text("merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n")
    return path


def run_shell(words: str, streams: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = f"{shlex.join(COMMAND)} {words} {streams}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=folder, timeout=120)


@pytest.mark.parametrize(
    "streams",
    ["2>&-", ">&-", "<&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "--json >/dev/full"],
)
def test_a_merge_that_nobody_can_hear_is_finished(recipe: Path, streams: str) -> None:
    done = run_shell("merge recipe.yml out", streams, recipe.parent)
    assert done.returncode == 0, done.stderr
    assert verify(recipe.parent / "out").shards == 1


def test_worker_processes_do_without_streams_too(recipe: Path) -> None:
    done = run_shell("merge recipe.yml out --workers 1", "<&- >&- 2>&-", recipe.parent)
    assert done.returncode == 0
    assert verify(recipe.parent / "out").shards == 1


def test_an_error_that_nobody_can_hear_is_told_by_the_exit_code(recipe: Path) -> None:
    for streams in ("2>&-", "2>/dev/full", "<&- >&- 2>&-"):
        assert run_shell("merge nowhere.yml out", streams, recipe.parent).returncode == 2


def test_a_result_that_stdout_does_not_take_is_one_line(recipe: Path) -> None:
    done = run_shell("plan recipe.yml --json", ">/dev/full", recipe.parent)
    assert (done.returncode, done.stderr) == (1, "mergemill: error: stdout: No space left on device\n")


@pytest.mark.skipif(bool(UNPRIVILEGED) and shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.parametrize("what", ["a/model.safetensors", "a/config.json", "a", "recipe.yml", "locked"])
def test_permission_denied_is_one_line(recipe: Path, what: str) -> None:
    (recipe.parent / "locked").mkdir()
    (recipe.parent / what).chmod(0)
    command = [*UNPRIVILEGED, *COMMAND, "merge", "recipe.yml", "locked/out" if what == "locked" else "out", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent)
    (recipe.parent / what).chmod(0o755)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert "ermission denied" in line
    assert what.rpartition("/")[0] in line


def test_a_file_that_cannot_be_opened_leaves_nothing_to_be_closed(tmp_path: Path) -> None:
    """What is printed by a finaliser is an error here."""
    path = tmp_path / "file"
    path.write_bytes(b"data")
    pin = pin_file(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    held = [os.open(path, os.O_RDONLY) for _ in range(highest)]  # so that no number below is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, hard))
    try:
        with pytest.raises(StorageError, match=r"file: cannot be opened: Too many open files"):
            read_into(pin, 0, memoryview(bytearray(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


def test_what_the_system_refuses_is_no_fault_of_mergemill() -> None:
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/a/b")) == "/a/b: Permission denied"
    assert explain(OSError(errno.EMFILE, "Too many open files", "/a")).endswith("more of them with: ulimit -n 4096")
    assert "fault of mergemill" in explain(OSError(errno.EBADF, "Bad file descriptor"))

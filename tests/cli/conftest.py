"""Small models and recipes for the command line's tests, and the command itself."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from models import write_llama

from mergemill.cli.main import execute

TIES = """\
merge_method: ties
base_model: ./base
models:
  - {model: ./a, parameters: {weight: 0.6, density: 0.5}}
  - {model: ./b, parameters: {weight: 0.4, density: 0.5}}
"""

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]
COMMAND = (sys.executable, "-c", "from mergemill.cli.main import main; main()")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `a`, `b` (15 MB each, 111 tensors) and recipes for them. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    write = partial(write_llama, layers=12, hidden=256, intermediate=512, vocab=1024)
    base = write(folder / "base", seed=0)
    for seed, name in enumerate("ab", start=1):
        write(folder / name, seed=seed, near=base)
    (folder / "ties.yml").write_text(TIES)
    (folder / "typo.yml").write_text("merge_method: linear\ndtpye: float16\nmodels: [{model: ./a}]\n")
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models` as the working directory."""
    monkeypatch.chdir(models)
    return models


@pytest.fixture
def mergemill(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = execute([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def _heed_interrupts() -> None:
    """What runs the tests in the background may ignore Ctrl-C, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command as a process in a group of its own, as a shell does; what still runs is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        *arguments: object, cwd: Path, stderr: int = subprocess.PIPE, **environment: str
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        assert process.stdout is not None
        # A narrow pipe: what prints an event a part waits for its reader, and is not done before it can be stopped.
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()

"""The files of deploy/, what their command lines are, and the programs that check them, offline."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker

DEPLOY = Path(__file__).parents[1] / "deploy"
WORDS = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}  # of the image's entry point


def need_module(name: str, package: str) -> None:
    """Skip, or in CI fail, the test that needs a package."""
    if importlib.util.find_spec(name) is None:
        _missing(f"{package} is not installed: pip install {package}")


def run_program(name: str, *arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that a package of this environment brings; skips, or in CI fails, where it is missing."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        _missing(f"{name} is not installed")
    command = [str(found), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def _missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def read_yaml(path: Path) -> list[Any]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def check_command(words: Sequence[str]) -> Mapping[str, Any]:
    """Return what a container's command line says, by name; raises `click.UsageError` where it is none of the image's.

    Variables that Kubernetes fills in stand for a word.
    """
    given = [re.sub(r"\$\((\w+)\)", r"\1", word) for word in words]
    first = given[0]
    if first in WORDS:
        with WORDS[first].make_context(first, given[1:]) as context:
            return context.params
    return check_mergemill(given)


def check_mergemill(words: Sequence[str]) -> Mapping[str, Any]:
    """Return the parameters of a command line of mergemill, without its name."""
    app = _command_line()
    with app.make_context("mergemill", list(words[:1])) as above:
        name, command, _ = app.resolve_command(above, list(words))
        assert command is not None
        with command.make_context(str(name), list(words[1:]), parent=above) as context:
            return {"command": name, **context.params}


@functools.cache
def _command_line() -> Any:
    from mergemill.cli.app import make_command

    return make_command()


def iter_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each line of mergemill in a text, without its name; lines may go on after a backslash."""
    joined = re.sub(r"\\\n#?\s*", " ", text)
    for found in re.finditer(r"^(?:#\s+|\s*)mergemill ([a-z].*)$", joined, re.MULTILINE):
        yield shlex.split(found[1], comments=True)


def is_refused(words: Sequence[str]) -> bool:
    """Whether a command line is none of the image's."""
    try:
        check_command(words)
    except Exception as error:  # typer may bring its own click beside the one that Dask uses
        if type(error).__name__ not in ("NoSuchOption", "UsageError", "BadParameter", "MissingParameter"):
            raise
        return True
    return False

"""The objective `command`: a program of the user's own, whose last number on its standard output is the score.

It is started without a shell, in a group of processes of its own, which ends with it, or when its time is over.
"""

import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from mergemill.engine.errors import MergeError, RecipeError

_NUMBER = re.compile(rb"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?![\w.])", re.IGNORECASE)
_PLACE = re.compile(r"\{(\w+)\}")
PLACES = ("model", "recipe", "values")
READ_BYTES = 1 << 16  # of its output's end


class CommandFailed(MergeError):
    """A command gave no score; the message says why."""


def list_places(command: str, where: str) -> set[str]:
    """Return which of `PLACES` a command names; `RecipeError` where it cannot be split or names another."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RecipeError(f"{where}: the command {command!r} cannot be split into words: {error}") from None
    named = {name for word in words for name in _PLACE.findall(word)}
    if not named & set(PLACES):
        needs = "it needs {model}, {recipe} or {values}"
        raise RecipeError(f"{where}: the command {command!r} names no candidate; {needs}")
    return named & set(PLACES)


def run_command(command: str, given: Mapping[str, str], limit_s: float) -> float:
    """Return the last number that a command prints; `CommandFailed` where it fails, hangs or prints none."""
    words = [_PLACE.sub(lambda found: given.get(found[1], found[0]), word) for word in shlex.split(command)]
    return _read_number(run_words(words, limit_s, words[0]), words[0])


def run_words(words: Sequence[str], limit_s: float, name: str) -> bytes:
    """Return the end of what a program prints; `CommandFailed`, with `name` first, where it fails or hangs."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, close_fds=True
            )
        except OSError as error:
            raise CommandFailed(f"{name}: cannot be started: {error.strerror}") from None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{name}: was not done after {limit_s:g} s") from None
        finally:
            _end(process)
        if code:
            last = _read_end(err).decode(errors="replace").strip().rpartition("\n")[2]
            raise CommandFailed(f"{name}: ended with {_say_code(code)}{f': {last}' if last else ''}")
        return _read_end(out)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the group of a command, also what it left running."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_end(file: IO[bytes]) -> bytes:
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, size_bytes - READ_BYTES))
    return file.read()


def _say_code(code: int) -> str:
    return f"status {code}" if code > 0 else f"signal {-code}"


def _read_number(printed: bytes, name: str) -> float:
    found = _NUMBER.findall(printed)
    if not found:
        raise CommandFailed(f"{name}: printed no number")
    number = float(found[-1])
    if not math.isfinite(number):
        raise CommandFailed(f"{name}: printed {found[-1].decode()}, which is no score")
    return number

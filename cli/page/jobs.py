"""Runs that the page starts: each a command of mergemill in a process and session of its own, with a folder of notes.

The notes say which command, of which recipe, to which output, as whose process; what happens to a merge is said beside
its output, as of any other. So a page that is closed, killed or started again loses nothing, and many pages and
browsers see the same. An identity is made of the output's place, so that an output has one run, and who starts one
holds a lock on all notes meanwhile. Notes are files of their folder itself; links are not followed.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from mergemill.cli.page.settings import Chosen, Setup, parse_chosen
from mergemill.engine import errors

FOLDER = ".mergemill-page"  # below the root
MERGE, COMPARE, PUSH, SEARCH = "merge", "compare", "push", "search"  # the last are looked at alone
RECIPE, LOG, NOTE, REPORT = "recipe.yml", "log.txt", "run.json", "report.html"
MOST_LOG_BYTES = 32 << 10  # that are shown
MOST_NOTE_BYTES = 1 << 20  # of a recipe, or a note
_STARTING = threading.Lock()
_SLACK_S = 1.0  # between two ways to tell when a process began


@dataclass(frozen=True, slots=True)
class Errand:
    """A command that runs, or ran."""

    kind: str
    out: str  # of a merge, or what is pushed; of a comparison its words
    chosen: dict[str, Any] = field(default_factory=dict)
    report: bool = False  # a page of what the merge changed is asked for
    words: tuple[str, ...] = ()  # of a command that is no merge
    pid: int = 0
    began: float = 0.0  # of the process, seconds since 1970
    started: float = 0.0  # when the page asked for it last

    @property
    def name(self) -> str:
        """Its identity, by which addresses and its folder call it."""
        return make_name(self.kind, self.out, *self.words)


def make_name(kind: str, *words: str) -> str:
    """Return the identity of a run.

    >>> make_name("merge", "merged")
    'bf8f2cce14838df5'
    """
    return hashlib.sha256("\0".join((kind, *words)).encode()).hexdigest()[:16]


def find_folder(root: Path, name: str) -> Path:
    """Return the folder of a run's notes; `InputError` for what is no identity."""
    if len(name) != 16 or not set(name) <= set("0123456789abcdef"):
        raise errors.InputError("there is no such run")
    folder = root / FOLDER / name
    if folder.is_symlink() or folder.parent.is_symlink():
        raise errors.InputError(f"{folder}: is reached by a link; remove it")
    return folder


def read_job(root: Path, name: str) -> Errand | None:
    """Return a run by its notes; None where there are none, or they are damaged."""
    try:
        told = json.loads(_read(find_folder(root, name) / NOTE))
        job = Errand(**{**told, "words": tuple(told["words"]), "chosen": asdict(parse_chosen(told["chosen"]))})
    except (OSError, ValueError, TypeError, KeyError, errors.InputError):
        return None
    return job if job.name == name else None


def list_jobs(root: Path) -> list[Errand]:
    """Return all runs that have notes."""
    try:
        names = [path.name for path in (root / FOLDER).iterdir()]
    except OSError:
        return []
    jobs = []
    for name in names:
        with suppress(errors.InputError):
            jobs.append(read_job(root, name))
    return [job for job in jobs if job is not None]


@contextmanager
def hold_starts(root: Path) -> Iterator[None]:
    """Let nobody else start a run below a root, in this process or another: from a look at what runs to the start."""
    (root / FOLDER).mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(root / FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _STARTING:
            with suppress(OSError):  # on storage without locks, where this process is alone
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
    finally:
        os.close(descriptor)


def start_merge(setup: Setup, text: str, out: str, chosen: Chosen, *, report: bool) -> Errand:
    """Note a recipe and start its merge; its output's place and its plan were checked before."""
    job = Errand(MERGE, out, asdict(chosen), report)
    folder = _make_folder(setup.root, job)
    _write(folder / RECIPE, text if text.endswith("\n") else f"{text}\n")
    return _start(setup, job)


def start_other(setup: Setup, kind: str, out: str, words: Sequence[str]) -> Errand:
    """Start a comparison or a push."""
    job = Errand(kind, out, words=tuple(words))
    _make_folder(setup.root, job)
    return _start(setup, job)


def resume(setup: Setup, job: Errand) -> Errand:
    """Start a run again: a merge goes on where it stopped."""
    if is_alive(job):
        raise errors.InputError("it runs already")
    return _start(setup, job)


def is_alive(job: Errand) -> bool:
    """Whether the process of a run is there, and the very one."""
    with suppress(psutil.Error):
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.began) < _SLACK_S
        return bool(job.pid) and same and process.status() != psutil.STATUS_ZOMBIE
    return False


def end(job: Errand) -> None:
    """Ask the process of a run to end, as Ctrl-C does, where it has not begun to write."""
    if is_alive(job):
        psutil.Process(job.pid).send_signal(2)


def forget(root: Path, name: str) -> None:
    """Remove the notes of a run."""
    shutil.rmtree(find_folder(root, name), ignore_errors=True)


def read_log(root: Path, name: str) -> str:
    """Return the end of what a run has printed."""
    try:
        with open(_open(find_folder(root, name) / LOG, os.O_RDONLY), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MOST_LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_recipe(root: Path, name: str) -> str:
    """Return the recipe that a run was started with; empty where there is none."""
    try:
        return _read(find_folder(root, name) / RECIPE)
    except (OSError, UnicodeDecodeError):
        return ""


def make_words(job: Errand, setup: Setup) -> list[str]:
    """Return the command of a run, its paths from the root, and behind all options."""
    place = f"{FOLDER}/{job.name}"
    if job.kind == MERGE:
        report = ["--report", f"{place}/{REPORT}"] if job.report else []
        chosen = parse_chosen(job.chosen).list_words()
        return ["merge", *chosen, *setup.list_words(), *report, "--", f"{place}/{RECIPE}", job.out]
    if job.kind == COMPARE:
        first, second, *base = job.words
        html = ["--html", f"{place}/{REPORT}"]
        return ["diff", *(["--base", *base] if base else []), *setup.list_crew_words(), *html, "--", first, second]
    repository, *public = job.words
    return ["push", *(["--public"] if public else []), "--", job.out, repository]


def _start(setup: Setup, job: Errand) -> Errand:
    folder = find_folder(setup.root, job.name)
    words = make_words(job, setup)
    try:
        log = open(_open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")  # noqa: SIM115 -- see below
    except OSError as error:
        raise errors.OutputError(f"{folder / LOG}: cannot be written: {error.strerror}") from None
    with log:
        log.write(f"$ mergemill {' '.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "mergemill", *words],
            cwd=setup.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that a Ctrl-C at the page's terminal is not theirs
        )
    _CHILDREN.append(process)
    with suppress(psutil.Error):
        job = replace(job, began=psutil.Process(process.pid).create_time())
    job = replace(job, pid=process.pid, started=time.time())
    _write(folder / NOTE, json.dumps(asdict(job)))
    return job


_CHILDREN: list["subprocess.Popen[bytes]"] = []  # of this process, which alone can take their ends off the system


def reap() -> None:
    """Take note of children that have ended."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def _make_folder(root: Path, job: Errand) -> Path:
    """Make the folder of a run's notes, which one alone can; `InputError` where another starts or runs it."""
    (root / FOLDER).mkdir(mode=0o700, exist_ok=True)
    folder = find_folder(root, job.name)
    if (old := read_job(root, job.name)) and is_alive(old):
        raise errors.InputError(f"{job.out}: it runs already; see the runs")
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that came to nothing
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise errors.InputError(f"{job.out}: another starts this now; see the runs") from None
    return folder


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with open(_open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(text.encode())
    unfinished.replace(path)


def _read(path: Path) -> str:
    with open(_open(path, os.O_RDONLY), "rb") as file:
        return file.read(MOST_NOTE_BYTES).decode()


def _open(path: Path, flags: int) -> int:
    """Return a descriptor of a file of notes; OSError for a link, or what is no file."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor

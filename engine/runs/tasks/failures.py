"""What a task's error means for the run, and which tensors it is about."""

import hashlib
import re
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from mergemill.engine.errors import MergemillError, RunError
from mergemill.engine.methods.own import find_own_line
from mergemill.engine.plan.values import Piece, Plan
from mergemill.engine.runs.worker.workplace import Workplace

RESUME = "run the same command again to resume"
Result = TypeVar("Result")
_MOST_NAMES = 3
_MOST_SAID = 1000  # characters of an error; Dask cuts what is longer than 10,000
_MOST_TRACE = 6000
_MOST_NAME = 60  # characters of a tensor's name in a key
_PLAIN = re.compile(r"[!-\[\]-~]{1,200}")  # printable ASCII without a backslash
_ABOUT = re.compile(r"(?P<name>.+)-(?:round\d+|rest)-.*")  # a key behind its kind, of a tensor's statistics


class WorkersDied(RunError):
    """Every worker that was given a task died; `key` is the task's."""

    def __init__(self, key: str, deaths: int) -> None:
        super().__init__(f"{deaths} workers died of the task {key}; {RESUME}")
        self.key = key
        self.deaths = deaths


def explain_failure(error: BaseException | None, trace: TracebackType | None, where: str = "a task") -> MergemillError:
    """Return the error that ends the run: the task's own, or for what nobody raised on purpose, how to go on.

    where: what the task was about.
    """
    if isinstance(error, MergemillError):
        return error
    said = f"{type(error).__name__}: {_say(error)}"
    if line := find_own_line(trace):
        about = f" ({where})" if where != "a task" else ""
        return RunError(f"{line}: {said}{about}; with another file it is another merge, into another folder")
    return RunError(f"{where} failed: {said}; {RESUME}")


def run_named(work: Callable[[], Result], pieces: Sequence[Piece], workplace: Workplace) -> Result:
    """Return what `work` returns; let an error that nobody raised on purpose say what the task was about.

    What a user's method raises may hold anything: some of it cannot be sent, of which Dask tells nobody, and the run
    would wait for ever. So only words travel.
    """
    try:
        return work()
    except MergemillError:
        raise
    except (Exception, SystemExit) as error:
        if workplace.stopping:  # and another worker has the task now
            raise
        failure = explain_failure(error, error.__traceback__, describe_pieces(pieces) or "a task")
        failure.add_note("".join(traceback.format_exception(error, chain=False))[-_MOST_TRACE:])
    raise failure  # here, so that the error itself is no part of it


def explain_deaths(error: WorkersDied, plan: Plan) -> RunError:
    """Return the error that ends a run whose workers die of one task: what it merges, and what it reads for that."""
    what = describe_pieces(_find_pieces(error.key, plan)) or error.key
    return RunError(
        f"{what}: {error.deaths} workers died while they had it; look for the reason in their logs (killed for memory? "
        f"then give them more); {RESUME}"
    )


def describe_pieces(pieces: Sequence[Piece]) -> str:
    """Return what is merged, and from where: names of tensors and of files, a few of each."""
    names = list(dict.fromkeys(piece.tensor.name for piece in pieces))
    reads = (read for piece in pieces for read in piece.tensor.expression.reads(piece.span))
    files = list(dict.fromkeys(read.pin.url for read in reads))
    return f"{_shorten(names)}, read from {_shorten(files)}" if names else ""


def name_in_key(name: str) -> str:
    r"""Return what a tensor is called in the keys of its tasks, which Dask writes to its logs as they are.

    The name itself where that is plain, else its beginning, escaped, and a checksum: no two tensors share a key, and
    no name speaks to a terminal through a log (2026-11-29).

    >>> name_in_key("lm_head.weight"), name_in_key("a\x1b[31m").isprintable()
    ('lm_head.weight', True)
    """
    if _PLAIN.fullmatch(name):
        return name
    return f"{ascii(name[:_MOST_NAME])[1:-1]}…{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"


def _find_pieces(key: str, plan: Plan) -> list[Piece]:
    """Return what a task merges, checks or gathers: its key holds a part's number or, before its round, a name."""
    kind, _, rest = key.partition("-")
    if kind in ("merge", "check"):
        return list(plan.parts[int(rest.partition("-")[0])].pieces)
    about = _ABOUT.fullmatch(rest)
    if about is None and kind == "gather":
        return list(plan.parts[int(rest.rpartition("-")[2])].pieces)  # of the squares of whole models
    name = about["name"] if about else None
    return [piece for part in plan.parts for piece in part.pieces if name_in_key(piece.tensor.name) == name]


def _say(error: BaseException | None) -> str:
    try:
        return str(error)[:_MOST_SAID]
    except Exception:  # noqa: BLE001  # a user's own, which may do anything
        return "it cannot say what"


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")

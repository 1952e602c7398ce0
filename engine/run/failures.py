"""What a task's error means for the run, and which tensors it is about."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from mergemill.engine.errors import MergemillError, RunError
from mergemill.engine.methods.own import find_own_line
from mergemill.engine.plan.values import Piece, Plan

RESUME = "run the same command again to resume"
_MOST_NAMES = 3


class WorkersDied(RunError):
    """Every worker that was given a task died; `key` is the task's."""

    def __init__(self, key: str, deaths: int) -> None:
        super().__init__(f"{deaths} workers died of the task {key}; {RESUME}")
        self.key = key
        self.deaths = deaths


def explain_failure(error: BaseException | None, trace: TracebackType | None) -> MergemillError:
    """Return the error that ends the run: the task's own, or for what nobody raised on purpose, how to go on."""
    if isinstance(error, MergemillError):
        return error
    if line := find_own_line(trace):
        return RunError(
            f"{line}: {type(error).__name__}: {error}; with another file it is another merge, into another folder"
        )
    where = "; ".join(getattr(error, "__notes__", ["a task"]))
    return RunError(f"{where} failed: {type(error).__name__}: {error}; {RESUME}")


@contextmanager
def naming(pieces: Sequence[Piece]) -> Iterator[None]:
    """Let an error of a task that nobody raised on purpose say what the task was about."""
    try:
        yield
    except Exception as error:
        error.add_note(describe_pieces(pieces))  # notes travel with it, from worker to driver
        raise


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


def _find_pieces(key: str, plan: Plan) -> list[Piece]:
    """Return what a task merges, checks or gathers: its key holds a part's number or, before its round, a name."""
    kind, _, rest = key.partition("-")
    if kind in ("merge", "check"):
        return list(plan.parts[int(rest.partition("-")[0])].pieces)
    name = rest.rpartition("-round")[0]
    if not name and kind == "gather":
        return list(plan.parts[int(rest.rpartition("-")[2])].pieces)  # of the squares of whole models
    return [piece for part in plan.parts for piece in part.pieces if piece.tensor.name == name]


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")

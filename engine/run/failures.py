"""What a task's error means for the run."""

from types import TracebackType

from mergemill.engine.errors import MergemillError, RunError
from mergemill.engine.methods.own import find_own_line


def explain_failure(error: BaseException | None, trace: TracebackType | None) -> MergemillError:
    """Return the error that ends the run: the task's own, or for what nobody raised on purpose, how to go on."""
    if isinstance(error, MergemillError):
        return error
    if line := find_own_line(trace):
        return RunError(
            f"{line}: {type(error).__name__}: {error}; with another file it is another merge, into another folder"
        )
    kind = type(error).__name__
    return RunError(f"a task failed: {kind}: {error}; run the same command again to resume")

"""Publishing a finished output on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from mergemill.engine.errors import OutputError
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.storage.store import Options, make_storage

if TYPE_CHECKING:
    from mergemill.engine.runs.outputs.publishing import OnFile, Pushed


def push(
    out: str | Path,
    repository: str,
    *,
    public: bool = False,
    storage_options: Options | None = None,
    on_file: "OnFile | None" = None,
) -> "Pushed":
    """Publish the finished merge in `out` as ``org/name``; a repository that is made is private unless `public`.

    Raises `OutputError` where `out` holds no finished merge, or the repository anything else; `RunError` and
    `StorageError` for what goes wrong on the way: the same call goes on. on_file: is told of each file of weights
    before it is sent. `storage_options` are those of `abort`.
    """
    try:
        from mergemill.engine.runs.outputs.publishing import publish
    except ImportError as error:
        raise OutputError(f"{error.name or error} is not installed; pip install mergemill[hub]") from error
    output = find_output(out, make_storage(storage_options))
    return publish(output, repository, on_file or _tell_nobody, public=public)


def _tell_nobody(name: str, number: int, count: int) -> None:
    """Take what is told."""

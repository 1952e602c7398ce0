"""``mergemill abort``: give up an unfinished merge."""

from collections.abc import Mapping
from typing import Any

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, Out, StorageAs, read_storage


def abort(out: Out, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False) -> None:
    """Remove what an unfinished merge has left.

    Example: mergemill abort merged
    """
    from mergemill.engine import abort as abort_merge
    from mergemill.engine import format_size

    storage = read_storage(storage_as, cluster)
    freed_bytes = abort_merge(out, storage_options=storage)
    kept = _is_finished(out, storage)
    if json:
        console.say_json({"out": out, "freed_bytes": freed_bytes, "finished_kept": kept})
        return
    stays = "; the finished merge that it was to replace stays, whole" if kept else ""
    console.say(f"{out}: the unfinished merge is removed, {format_size(freed_bytes)} freed{stays}")


def _is_finished(out: str, storage: Mapping[str, Mapping[str, Any]] | None) -> bool:
    """Whether a finished merge is there: one that was to be replaced, and was not yet."""
    from mergemill.engine import errors, status

    try:
        return status(out, storage_options=storage).state == "finished"
    except errors.OutputError:
        return False

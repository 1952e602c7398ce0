"""``mergemill abort``: give up an unfinished merge."""

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, Out, StorageAs, read_storage


def abort(out: Out, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False) -> None:
    """Remove what an unfinished merge has left.

    Example: mergemill abort merged
    """
    from mergemill.engine import abort as abort_merge
    from mergemill.engine import format_size

    freed_bytes = abort_merge(out, storage_options=read_storage(storage_as, cluster))
    if json:
        console.say_json({"out": out, "freed_bytes": freed_bytes})
        return
    console.say(f"{out}: the unfinished merge is removed, {format_size(freed_bytes)} freed")

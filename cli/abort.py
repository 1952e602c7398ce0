"""``mergemill abort``: give up an unfinished merge."""

from mergemill.cli import console
from mergemill.cli.options import Out


def abort(out: Out) -> None:
    """Remove what an unfinished merge has left.

    Example: mergemill abort merged
    """
    from mergemill.engine import abort as abort_merge
    from mergemill.engine import format_size

    freed_bytes = abort_merge(out)
    console.say(f"{out}: the unfinished merge is removed, {format_size(freed_bytes)} freed")

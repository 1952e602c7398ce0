"""``mergemill abort``: give up an unfinished merge."""

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Out, StorageAs, read_storage


def abort(out: Out, storage_as: StorageAs = None, cluster: ClusterAs = None) -> None:
    """Remove what an unfinished merge has left.

    Example: mergemill abort merged
    """
    from mergemill.engine import abort as abort_merge
    from mergemill.engine import format_size

    freed_bytes = abort_merge(out, storage_options=read_storage(storage_as, cluster))
    console.say(
        f"{out}: the unfinished merge is removed, {format_size(freed_bytes)} freed{_say_cost(out, freed_bytes)}"
    )


def _say_cost(out: str, freed_bytes: int) -> str:
    """Say what it would have cost to leave it there; nothing of a disk, or of storage without a known price."""
    from mergemill.engine.plan.prices import find_price

    price = find_price(out)
    if price is None or not price.stored_per_gb_month:
        return ""
    dollars = price.of_month(freed_bytes)
    amount = f"about ${dollars:,.2f}" if dollars >= 0.01 else "less than a cent"
    return f"; left there, {amount} a month by the list prices of {price.name}, {price.date}"

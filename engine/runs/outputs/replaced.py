"""A finished merge of ours that gives way to another: ``--overwrite``.

It is kept until the new merge has its workers and is about to write its first byte (2026-11-29): whatever is refused
before leaves it whole. Then its seal goes first, so that no loader takes what is left for a model, and its record last,
by which a run that was killed in between is known, and goes on. Beside it would be safer still, and would take twice
the room, and a place of its own, of which no other command knows.

Only what the record names is removed, and only as it was written: a file that was changed since, or any other file,
is a reason to refuse.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.record import Record
from mergemill.engine.storage.ranges import is_remote

KEPT = ("lock", "driver.json", "cancel")  # of the notes: they are the new merge's already


def check_all_ours(ours: Collection[str], found: Sequence[str], record: Record, where: str) -> None:
    """Raise `OutputError` where a finished merge's place holds more than that, or something of it was changed.

    ours: names of what is as it was written. found: names of all that is there, mergemill's notes aside.
    """
    foreign = sorted(set(found) - set(ours))
    if not foreign:
        return
    more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
    changed = foreign[0] in record.files or foreign[0] in record.shards
    why = "was changed since it was written" if changed else "is no file of the merge that is there"
    raise OutputError(f"{where}: {foreign[0]!r}{more} {why}; --overwrite replaces nothing else: move it away")


def check_sources(plan: Plan, place: str) -> None:
    """Raise `OutputError` where a merge reads from the output that it would replace."""
    copied = [file.copied for file in plan.files if file.copied is not None]
    for pin in (*plan.pins, *copied):
        if _is_below(pin.url, place):
            raise OutputError(
                f"{place}: {pin.url} is a source of this merge, which would replace it; choose another output"
            )


def _is_below(url: str, place: str) -> bool:
    """Whether a file lies below a place.

    >>> _is_below("s3://b/out/x.safetensors", "s3a://b/out"), _is_below("s3://b/out-2/x", "s3://b/out")
    (True, False)
    """
    if is_remote(url) != is_remote(place):
        return False
    if is_remote(url):
        return url.replace("s3a://", "s3://").startswith(f"{place.replace('s3a://', 's3://').rstrip('/')}/")
    return Path(url).resolve().is_relative_to(Path(place).resolve())

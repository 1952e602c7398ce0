"""A finished merge of ours that gives way to another: ``--overwrite``.

It is kept until the new merge has its workers and is about to write its first byte (2026-11-29): whatever is refused
before leaves it whole. Then its seal goes first, so that no loader takes what is left for a model, and its record last,
by which a run that was killed in between is known, and goes on. Beside it would be safer still, and would take twice
the room, and a place of its own, of which no other command knows.

Only what the record names is removed, and only as it was written, as far as that is seen without reading all of it:
of a small file the checksum is compared, of a shard the size and the header. Whatever differs, and any other file, is a
reason to refuse. A shard whose numbers were changed in place is not told from one as it was written.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.record import Record
from mergemill.engine.storage.same import holds_place, resolve_place
from mergemill.engine.storage.store import is_on_disk

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
    """Raise `OutputError` where a merge, be it this one or another, reads from the output that is to be replaced."""
    copied = [file.copied for file in plan.files if file.copied is not None]
    urls = list(dict.fromkeys(pin.url for pin in (*plan.pins, *copied)))
    for url in urls:
        if holds_place(place, url):
            raise OutputError(
                f"{place}: {url} is a source of this merge, which would replace it; choose another output"
            )
    if is_on_disk(place):
        _check_links(urls, place)
    for path in filter(None, (plan.origin.name, *(file.path for file in plan.origin.code))):
        if Path(path).is_file() and holds_place(place, path):
            raise OutputError(f"{path}: lies in {place}, which --overwrite removes; copy it elsewhere, and use that")


def _check_links(urls: Sequence[str], place: str) -> None:
    """Raise `OutputError` where a source is another name of a file of the output: removing that one would change it."""
    held = dict(_list_numbers(resolve_place(place)))
    for url in filter(is_on_disk, urls):
        with suppress(OSError):  # what is gone is told when it is read
            found = Path(resolve_place(url)).stat()
            if (name := held.get((found.st_dev, found.st_ino))) is not None:
                raise OutputError(
                    f"{place}: {url} is a source of this merge, and a hard link to {name}, which would be replaced; "
                    "choose another output"
                )


def _list_numbers(folder: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield what each file below a folder is known by, device and number, and its path."""
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            found = path.lstat()
            yield (found.st_dev, found.st_ino), str(path)

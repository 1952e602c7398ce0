"""Giving up an unfinished merge."""

from contextlib import suppress
from pathlib import Path

from mergemill.engine.errors import MergemillError, OutputError
from mergemill.engine.runs.driver import DRIVER_NAME, read_driver
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.runs.replacing import IN_PART, WHOLE, find_old
from mergemill.engine.storage.store import Options, make_storage


def abort(out: str | Path, *, storage_options: Options | None = None) -> int:
    """Remove what an unfinished merge left at `out`; returns the bytes freed. Nothing else is touched.

    A finished merge that was to be replaced stays where nothing of it was removed yet. storage_options: how `out` is
    reached, as a recipe says it, beside what the environment says.
    """
    output = find_output(out, make_storage(storage_options))
    driver = None
    with suppress(MergemillError):  # of what cannot be reached, `output.abort` says so
        driver = read_driver(output.notes)
    if driver is None or not driver.replaces:
        return output.abort()
    with output.locked():  # so that nobody drives it
        record = None
        with suppress(OutputError):  # one that is damaged is of an abort's concern alone
            record = output.read_record()
        old = find_old(output, read_driver(output.notes), record)
        if old == WHOLE:
            output.notes.remove(DRIVER_NAME)
            return 0
    return output.abort(replaced=old == IN_PART)

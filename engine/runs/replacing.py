"""What is there of a finished merge while another one replaces it: ``--overwrite``, see `outputs.replaced`.

Until the new merge has noted what it is, its driver alone tells of it, and what lies there looks finished (2026-11-30):
so the driver's note names the merge that gives way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from mergemill.engine.runs.driver import DRIVER_NAME, Driver
from mergemill.engine.runs.outputs.output import Output
from mergemill.engine.runs.outputs.record import Record

WHOLE, IN_PART = "whole", "removed in part"


def find_old(output: Output, driver: Driver | None, record: Record | None) -> str:
    """Return what is there of a finished merge that a driver replaces, or was to; empty where none gives way, or more.

    driver, record: what was read of both. All of it is there until the driver has its workers.
    """
    if driver is None or not driver.replaces or driver.started is not None or driver.committed is not None:
        return ""
    if record is None or record.digest != driver.replaces:
        return ""
    committed = output.journal.is_committed()
    if not (record.finished or committed):  # the same merge has begun again
        return ""
    return WHOLE if committed and is_all_there(output, record) else IN_PART


def say_old(old: str) -> str:
    """Say what became of the finished merge that is to be replaced.

    >>> say_old(IN_PART)
    'the finished merge there, which it replaces, is removed in part'
    """
    return f"the finished merge there, which it replaces, is {old}"


def is_all_there(output: Output, record: Record) -> bool:
    """Whether each file of a finished merge is there."""
    return all(output.find(name) is not None for name in (*record.files, *record.shards))


@contextmanager
def leaving_whole(output: Output, *, replaced: bool) -> Iterator[str]:
    """Yield the digest of the finished merge that gives way; empty where none does.

    Where a merge ends before it has replaced what is there, that is left as it was: nobody drives it.
    """
    record = output.read_record() if replaced else None
    try:
        yield record.digest if record else ""
    except BaseException:
        if record is not None and output.journal.is_committed() and is_all_there(output, record):
            output.notes.remove(DRIVER_NAME)
        raise

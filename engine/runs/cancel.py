"""Asking the driver of a merge, wherever it runs, to end so that the merge can be resumed."""

import getpass
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path

from mergemill.engine.errors import OutputError, RunError
from mergemill.engine.runs.driver import CANCEL_NAME, Driver, read_driver, request_cancel
from mergemill.engine.runs.outputs.output import Output, find_output
from mergemill.engine.runs.replacing import WHOLE
from mergemill.engine.runs.status import CANCELLING, FINISHED, RUNNING, Status, find_live_driver, find_status
from mergemill.engine.storage.store import Options, make_storage

WAIT_S = 120.0  # for a driver to end: a few seconds until it looks, and what its tasks take for a slab
_LOOK_S = 0.5


def cancel(out: str | Path, *, wait_s: float = WAIT_S, storage_options: Options | None = None) -> Status:
    """Ask the driver of the merge in `out` to end; returns what has become of the merge after at most `wait_s`.

    Its tasks end at their next slab, and their receipts are kept: the same merge resumes. One that was to replace a
    finished merge and had not begun to leaves that as it was: finished, with `old` whole. `OutputError` where there is
    no merge, or none that somebody drives; `RunError` where it has not ended in that time, but may still.
    `storage_options` are those of `abort`.
    """
    storage = make_storage(storage_options)
    output = find_output(out, storage)
    before = find_status(output)
    if before.state not in (RUNNING, CANCELLING) or before.driver is None:
        raise OutputError(f"{output}: {_say_idle(before)}, so there is nothing to cancel")
    request_cancel(output.notes, before.driver, _say_who())
    if wait_s > 0:
        _wait(output, before.driver, wait_s)
    after = find_status(find_output(out, storage))
    ended = before.old == WHOLE and after.state == FINISHED and after.driver is None
    return replace(after, old=WHOLE) if ended else after


def _wait(output: Output, driver: Driver, wait_s: float) -> None:
    """Return once the driver has ended, has gone, or another one has come."""
    end_s = time.monotonic() + wait_s
    while (alive := find_live_driver(output)) and alive.token == driver.token:
        if time.monotonic() > end_s:
            raise RunError(
                f"{output}: {driver.say_process()} has not ended in {wait_s:g} s; it is asked to, and "
                f"will when it looks; see: mergemill status {shlex.quote(str(output))}"
            )
        time.sleep(_LOOK_S)
    last = read_driver(output.notes)
    if last is not None and last.token == driver.token:
        output.notes.remove(CANCEL_NAME)  # it was killed, or ended before it could see this, and nobody will


def _say_idle(status: Status) -> str:
    return "is finished" if status.state == FINISHED else "nobody drives this merge"


def _say_who() -> str:
    """Return who asks."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = f"user {os.getuid()}"
    return f"{user} on {os.uname().nodename}"

"""Watching a merge that another process drives, as if it ran here: the same events, by what lies beside its output."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergemill.engine.errors import OutputError, RunError
from mergemill.engine.runs.driver import Driver, read_driver
from mergemill.engine.runs.events import Committed, OnEvent, PartFinished, Started, ignore
from mergemill.engine.runs.outputs.lease import RENEW_S
from mergemill.engine.runs.outputs.output import Output, find_output
from mergemill.engine.runs.replacing import find_old, say_old
from mergemill.engine.runs.status import count_bytes, explain_none, find_live_driver
from mergemill.engine.runs.tasks.guard import Report, TensorChange
from mergemill.engine.storage.store import Options, make_storage

LOOK_S = 1.0  # between two looks at the journal
END_S = 5.0  # for a driver to say how it ended, once the output is whole


def attach(
    out: str | Path, *, wait_s: float = 0.0, storage_options: Options | None = None, on_event: OnEvent = ignore
) -> Committed:
    """Call `on_event` with what happens to the merge in `out` until it is finished; nothing is done to it.

    wait_s: for somebody to drive it, as where its job still waits for a machine. Raises `OutputError` where there is no
    merge, and `RunError` where nobody drives it, or no more, with the reason as far as that is known. `storage_options`
    are those of `abort`.
    """
    output = find_output(out, make_storage(storage_options))
    end_s = time.monotonic() + wait_s
    while True:
        driver = read_driver(output.notes)
        if output.journal.is_committed() and not _find_old(output, driver):
            return _finish(output, _Onlooker(output, on_event), None)
        if driver := find_live_driver(output):
            return _follow(output, driver, on_event)
        if time.monotonic() >= end_s:
            raise _explain_idle(output)
        time.sleep(LOOK_S)


class _Onlooker:
    """Tells of receipts as they appear in the journal."""

    def __init__(self, output: Output, on_event: OnEvent) -> None:
        self._journal = output.journal
        self._done: set[int] = set()  # numbers of parts
        self._done_bytes = self._read_bytes = 0
        self.on_event = on_event

    def look(self, *, kept: bool = False) -> None:
        """Tell of what is new; `kept` where it was there before."""
        for receipt in self._journal.follow():
            if receipt.part in self._done:
                continue  # what was on the disk did not fit the receipt, and was merged again
            self._done.add(receipt.part)
            self._done_bytes += count_bytes([receipt])
            self._read_bytes += 0 if kept else receipt.read_bytes
            self.on_event(PartFinished(receipt, kept, len(self._done), self._done_bytes, self._read_bytes))


def _follow(output: Output, driver: Driver, on_event: OnEvent) -> Committed:
    """Tell of what a driver does until it ends; what comes after it is another's."""
    onlooker, started = _Onlooker(output, on_event), False
    alive_s, old = time.monotonic(), _find_old(output, driver)
    while True:
        now = read_driver(output.notes)
        current = now is not None and now.token == driver.token
        if now is not None and current and now.started is not None and not started:
            started = True
            on_event(_parse_started(now.started, output))
            onlooker.look(kept=True)
        if started:
            onlooker.look()
        old = _find_old(output, now) if current else old
        if not old and output.journal.is_committed():
            return _finish(output, onlooker, driver)
        if now is None or not current or now.ended is not None:
            raise _explain_end(output, now if current else None, old)
        if time.monotonic() - alive_s > RENEW_S:
            alive_s = time.monotonic()
            if find_live_driver(output) is None:
                raise _explain_end(output, read_driver(output.notes), old)
        time.sleep(LOOK_S)


def _finish(output: Output, onlooker: _Onlooker, driver: Driver | None) -> Committed:
    """Tell of the last parts and the commit, as its driver does; in few numbers where that has said nothing."""
    if driver is not None:
        onlooker.look()
    committed = _read_committed(output, driver)
    onlooker.on_event(committed)
    return committed


def _read_committed(output: Output, driver: Driver | None) -> Committed:
    end_s = time.monotonic() + END_S
    while driver is not None and time.monotonic() < end_s:
        last = read_driver(output.notes)
        if last is None or last.token != driver.token or last.committed is not None:
            break
        time.sleep(0.1)
    last = read_driver(output.notes) if driver is not None else None
    if last is not None and last.committed is not None:
        return _parse_committed(last.committed, output)
    record = output.read_record()
    assert record is not None  # it is committed
    write_bytes = sum(stop - start for _, start, stop in record.parts)
    return Committed(str(output), record.digest, len(record.parts), 0, write_bytes, 0, 0.0, Report((), ()))


def _find_old(output: Output, driver: Driver | None) -> str:
    """Return what is there of a finished merge that a driver replaces; nothing is read where it replaces none."""
    return find_old(output, driver, output.read_record()) if driver and driver.replaces and not driver.started else ""


def _parse_started(value: Mapping[str, Any], output: Output) -> Started:
    return Started(**{**value, "out": value["out"] or str(output), "warnings": tuple(value["warnings"])})


def _parse_committed(value: Mapping[str, Any], output: Output) -> Committed:
    guard = {name: tuple(TensorChange(**change) for change in changes) for name, changes in value["guard"].items()}
    more = {"out": value["out"] or str(output), "warnings": tuple(value.get("warnings", ()))}
    return Committed(**{**value, **more, "guard": Report(**guard)})


def _explain_idle(output: Output) -> OutputError | RunError:
    """Return the error of who watches a merge that nobody drives."""
    driver = read_driver(output.notes)
    if driver is None and output.read_record() is None:
        return explain_none(output)
    return _explain_end(output, driver, _find_old(output, driver))


def _explain_end(output: Output, driver: Driver | None, old: str) -> RunError:
    """Return the error of who watched a merge that has ended without being finished; old: what it was to replace."""
    way = f"{say_old(old)}; run it again, with --overwrite, to go on" if old else "run the merge again to resume"
    if driver is None:
        told = "it ended" if old else "nobody drives this merge"
        return RunError(f"{output}: {told}; {way}")
    where = driver.say_process()
    if driver.ended is None:
        return RunError(f"{output}: {where} is gone without a word, as if killed; {way}")
    why = f": {driver.error}" if driver.error else ""
    return RunError(f"{output}: {where} ended, {driver.how}{why}; {way}")

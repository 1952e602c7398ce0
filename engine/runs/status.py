"""How far a merge is and who drives it, from what lies beside its output: from any machine that sees that."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.runs.driver import DRIVER_NAME, LOCK_NAME, Driver, find_request, is_alive, read_driver
from mergemill.engine.runs.outputs.output import Output, find_output
from mergemill.engine.runs.outputs.receipts import Receipt, keep_planned
from mergemill.engine.runs.replacing import WHOLE, find_old
from mergemill.engine.runs.worker.workers import MEMORY
from mergemill.engine.storage.store import Options, make_storage

RUNNING, CANCELLING, UNFINISHED, FINISHED = "running", "cancelling", "unfinished", "finished"


@dataclass(frozen=True, slots=True)
class Status:
    """A merge, as it is now."""

    out: str
    state: str  # running, cancelling, unfinished (nobody drives it) or finished
    digest: str  # of the plan; empty, like what follows, where a driver still waits for workers
    kind: str  # of what it is made from: a merge, a raw one
    recipe: str  # its name, as the driver was given it
    seed: int
    shard_size: str
    parts: int
    parts_done: int
    write_bytes: int  # of all parts
    done_bytes: int
    bytes_per_s: float | None  # since the workers were there; None where nothing is known of that, or nobody works
    left_s: float | None  # at that rate
    seen_s: float | None  # since the driver gave a sign of life; None where it ended, or nobody can say
    driver: Driver | None  # who drives it, or did last
    old: str = ""  # whole, or removed in part: the finished merge there that this one is to replace, and has not yet

    @property
    def chosen_memory_bytes(self) -> int | None:
        """What each worker is promised, where that is another than the default."""
        started = self.driver.started if self.driver else None
        memory_bytes = int(started["memory_bytes"]) if started else None
        return None if memory_bytes == parse_size(MEMORY, what="memory") else memory_bytes


def status(out: str | Path, *, storage_options: Options | None = None) -> Status:
    """Return how far the merge in `out` is, and who drives it; `OutputError` where there is none.

    `storage_options` are those of `abort`.
    """
    return find_status(find_output(out, make_storage(storage_options)))


def find_status(output: Output) -> Status:
    """Return the status of the merge in an output."""
    record, driver = output.read_record(), read_driver(output.notes)
    if record is None and driver is None:
        raise explain_none(output)
    old = find_old(output, driver, record)
    if old == WHOLE and driver and driver.ended is not None:  # it leaves that as it was, and takes its note back
        old, driver = "", None
    if old:  # of the new merge nothing is noted yet
        record = None
    done = keep_planned(output.journal.read() if record else (), record.parts if record else ()).values()
    seen_s = output.notes.get_age(LOCK_NAME) if driver and driver.ended is None else None
    state = _find_state(output, driver, seen_s, old)
    parts = record.parts if record else ()
    write_bytes = sum(stop - start for _, start, stop in parts)
    done_bytes = write_bytes if state == FINISHED else count_bytes(done)
    rate = _find_rate(output, driver, done_bytes) if state == RUNNING else None
    return Status(
        out=str(output),
        state=state,
        digest=record.digest if record else "",
        kind=record.kind if record else "",
        recipe=record.recipe_name if record else "",
        seed=record.seed if record else 0,
        shard_size=record.shard_size if record else "",
        parts=len(parts),
        parts_done=len(parts) if state == FINISHED else len(done),
        write_bytes=write_bytes,
        done_bytes=done_bytes,
        bytes_per_s=rate,
        left_s=(write_bytes - done_bytes) / rate if rate else None,
        seen_s=seen_s if seen_s is not None and math.isfinite(seen_s) else None,
        driver=driver,
        old=old,
    )


def explain_none(output: Output) -> OutputError:
    """Return the error of who looks where no merge is."""
    known = " (one that goes to the Hub is known to the machine that drives it, until it is finished)"
    return OutputError(f"{output}: holds no merge{known if str(output).startswith('hf://') else ''}")


def find_live_driver(output: Output) -> Driver | None:
    """Return the driver of a merge that runs; None where none does."""
    driver = read_driver(output.notes)
    alive = driver is not None and is_alive(driver, output.notes.get_age(LOCK_NAME))
    return driver if alive else None


def count_bytes(receipts: Iterable[Receipt]) -> int:
    """Return the bytes that receipts stand for."""
    return sum(receipt.stop_bytes - receipt.start_bytes for receipt in receipts)


def _find_state(output: Output, driver: Driver | None, seen_s: float | None, old: str) -> str:
    if not old and output.journal.is_committed():
        return FINISHED
    if driver is None or not is_alive(driver, seen_s):
        return UNFINISHED
    return CANCELLING if find_request(output.notes, driver.token) else RUNNING


def _find_rate(output: Output, driver: Driver | None, done_bytes: int) -> float | None:
    """Return the bytes a second since the workers were there, which is when the driver wrote its note last."""
    if driver is None or driver.started is None:
        return None
    since_s = output.notes.get_age(DRIVER_NAME)
    written_bytes = done_bytes - driver.resumed_bytes
    return written_bytes / since_s if since_s and written_bytes > 0 else None

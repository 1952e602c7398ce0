"""Who drives a merge, as it says so beside the output, and requests that it end.

The driver writes ``.mergemill/driver.json`` when it begins, when the workers are there, and when it ends, and says why.
That it lives shows in ``.mergemill/lock``, which it renews. A request to end, ``.mergemill/cancel``, names the driver
that it is for, so that it ends no other one.

An output may be uploaded with all that lies beside it. So before it is marked as whole, the note is replaced by one
that tells nothing of where the merge ran: no host, process, job, folder, command or address (decided 2026-11-29).
"""

import itertools
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergemill.engine.errors import Cancelled, MergemillError, OutputError, StorageError
from mergemill.engine.runs.events import Committed, Started
from mergemill.engine.runs.outputs.lease import OLD_S, find_start, name_processes
from mergemill.engine.runs.outputs.notes import Notes

DRIVER_NAME, CANCEL_NAME, LOCK_NAME = "driver.json", "cancel", "lock"
DRIVER_MEMORY = "4GiB"  # of a driver that is submitted to a cluster
RESUME = "MERGEMILL_RESUME"  # the variable by which a job knows the command that submitted it
LOOK_S = 2.0  # between two looks for a request to end
LOOKS = 10  # for one whether another driver has begun

_LATEST_S = 250e9  # seconds since 1970: the last years that calendars know
_JOBS = {"SLURM_JOB_ID": "slurm", "PBS_JOBID": "pbs", "LSB_JOBID": "lsf"}  # variables of jobs


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that runs a merge, or ran it last."""

    host: str  # empty, like all that tells where it runs, once the output is a checkpoint
    pid: int
    processes: str  # what processes share that see each other by number
    began: str | None  # of the process, in ticks since its machine began
    token: str  # of this run
    since: float  # seconds since 1970, by its own clock
    job: str = ""  # of a batch system, such as "slurm 12", or a pod; empty where it was started by hand
    folder: str = ""  # its working directory, from which relative paths go; empty where that is gone
    resume: str = ""  # the command that runs the merge again from any directory; empty where it was no command
    started: Mapping[str, Any] | None = None  # `Started`, once the workers are there
    resumed_bytes: int = 0  # of the parts that earlier runs had finished by then
    ended: float | None = None  # seconds since 1970; None while it runs, or where it was killed
    replaces: str = ""  # the digest of the finished merge that gives way to this one; see `replacing`
    how: str = ""  # finished, cancelled, interrupted or failed
    error: str = ""  # why, in a line
    committed: Mapping[str, Any] | None = None  # `Committed`, where it finished

    def to_json(self) -> bytes:
        """Return the bytes of ``driver.json``."""
        return json.dumps(asdict(self)).encode()

    def say_process(self) -> str:
        """Return what messages call it."""
        return f"process {self.pid} of {self.host}" if self.host else "its driver"


def read_driver(notes: Notes) -> Driver | None:
    """Return who drives the merge, or did last; None where nobody has said so, or what was said is damaged.

    Nothing of a merge depends on this note: who resumes writes another.
    """
    data = notes.read(DRIVER_NAME)
    if data is None:
        return None
    try:
        driver = _DRIVER.validate_json(data, strict=True)
        for adapter, value in ((_STARTED, driver.started), (_COMMITTED, driver.committed)):
            if value is not None:
                adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return None
    return driver if all(0 <= time_s <= _LATEST_S for time_s in (driver.since, driver.ended or 0.0)) else None


def is_alive(driver: Driver, seen_s: float | None) -> bool:
    """Whether a driver still runs, that was last seen `seen_s` ago; None where nobody can say."""
    if driver.ended is not None:
        return False
    if driver.processes == name_processes():
        return find_start(driver.pid) == driver.began
    return seen_s is None or seen_s <= OLD_S


def request_cancel(notes: Notes, driver: Driver, by: str) -> None:
    """Ask a driver to end."""
    notes.write(CANCEL_NAME, json.dumps({"token": driver.token, "by": by}).encode())


def find_request(notes: Notes, token: str) -> str:
    """Return who asks the driver with that token to end; empty where nobody does."""
    try:
        request = json.loads(notes.read(CANCEL_NAME) or b"{}")
        return str(request["by"]) if request.get("token") == token else ""
    except (ValueError, KeyError, AttributeError, RecursionError):
        return ""


class Driving:
    """This process while it drives a merge."""

    def __init__(self, notes: Notes, resume: str, replaces: str = "") -> None:
        self._notes = notes
        self._driver = replace(_describe_here(), resume=resume, replaces=replaces)
        self._earlier = ""  # the token of the driver before
        self._reason: MergemillError | None = None  # why it is asked to end
        self._stop: Callable[[], None] | None = None
        self._stopped = False  # by that
        self._lock = threading.Lock()  # so that nothing is stopped that has ended

    def start(self, started: Started, resumed_bytes: int) -> None:
        """Say that the workers are there."""
        if not self._is_replaced():
            self._write(started=asdict(started), resumed_bytes=resumed_bytes)

    def commit(self, committed: Committed) -> None:
        """Say that the output is a checkpoint, and no more where it was merged, or who asked for what."""
        self._driver = hide_places(replace(self._driver, committed=asdict(committed)))
        if not self._is_replaced():
            self._notes.remove(CANCEL_NAME)
            self._write()

    @contextmanager
    def stopped_by(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop`, in another thread, when a request to end comes while the block lasts."""
        with self._lock:
            if self._reason:
                self._stopped = True
                raise self._reason
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None

    def look(self, ended: threading.Event) -> None:
        """Look for a request, and for another driver, now and then, until there is one, or the merge has ended."""
        for number in itertools.count(1):
            if ended.wait(LOOK_S):
                return
            with suppress(StorageError):  # the merge itself will say what is wrong with the storage
                if by := find_request(self._notes, self._driver.token):
                    self._end_by(Cancelled(f"cancelled by {by}"))
                    return
                if number % LOOKS == 0 and self._is_replaced():
                    self._end_by(OutputError("another mergemill has begun to write here; wait for it or stop it"))
                    return

    def begin(self) -> None:
        """Say that this process drives the merge; a request that an earlier driver left is for nobody."""
        earlier = read_driver(self._notes)
        self._earlier = earlier.token if earlier else ""
        self._notes.remove(CANCEL_NAME)
        self._write()

    def end(self, error: BaseException | None) -> BaseException | None:
        """Say how it ended; returns the error that it ended with."""
        if self._stopped and isinstance(error, Exception):
            error = self._reason
        with suppress(StorageError):  # of which the error may tell: it counts more
            if not self._is_replaced():
                self._notes.remove(CANCEL_NAME)
                self._write(ended=time.time(), how=_say_how(error), error=_say_why(error))
        return error

    def _is_replaced(self) -> bool:
        """Whether another driver has begun meanwhile, as after a long sleep of this process."""
        last = read_driver(self._notes)
        return last is not None and last.token not in (self._driver.token, self._earlier)  # which may be seen late

    def _write(self, **changes: Any) -> None:
        self._driver = replace(self._driver, **changes)
        self._notes.write(DRIVER_NAME, self._driver.to_json())

    def _end_by(self, reason: MergemillError) -> None:
        with self._lock:
            self._reason = reason
            if self._stop is not None:
                self._stop()
                self._stopped = True


@contextmanager
def drive(notes: Notes, resume: str = "", replaces: str = "") -> Iterator[Driving]:
    """Say beside the output that this process drives the merge, and heed requests to end it: `Cancelled`.

    resume: the command that runs the merge again, from any directory. replaces: the digest of the finished merge that
    gives way to this one.
    """
    driving, ended = Driving(notes, resume, replaces), threading.Event()
    looker = threading.Thread(target=driving.look, args=(ended,), name="mergemill-driver", daemon=True)
    driving.begin()
    looker.start()
    try:
        yield driving
    except BaseException as error:
        ended.set()
        looker.join()
        told = driving.end(error)
        if told is not error and told is not None:
            raise told from error
        raise
    ended.set()
    looker.join()
    driving.end(None)


def hide_places(driver: Driver) -> Driver:
    """Return what a finished output keeps of its driver: nothing of where that ran."""
    started = {**driver.started, "out": "", "dashboard": "", "warnings": ()} if driver.started else None
    committed = {**driver.committed, "out": "", "warnings": ()} if driver.committed else None
    hidden = Driver("", 0, "", None, driver.token, driver.since, started=started, committed=committed)
    return replace(hidden, resumed_bytes=driver.resumed_bytes, ended=driver.ended, how=driver.how)


def _describe_here() -> Driver:
    return Driver(
        host=os.uname().nodename,
        pid=os.getpid(),
        processes=name_processes(),
        began=find_start(os.getpid()),
        token=secrets.token_hex(8),
        since=time.time(),
        job=_find_job(),
        folder=find_folder(),
    )


def find_folder() -> str:
    """Return the working directory; empty where it is gone, so that nothing can be relative to it."""
    with suppress(FileNotFoundError):
        return str(Path.cwd())
    return ""


def _find_job() -> str:
    """Return the job that this process is, or belongs to."""
    for variable, system in _JOBS.items():
        if job := os.environ.get(variable):
            return f"{system} {job}"
    return f"pod {os.uname().nodename}" if "KUBERNETES_SERVICE_HOST" in os.environ else ""


def _say_how(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, Cancelled):
        return "cancelled"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _say_why(error: BaseException | None) -> str:
    """Return an error in a line; of one that nobody raised on purpose only its kind, since it may tell anything."""
    if error is None:
        return ""
    if isinstance(error, MergemillError) or not isinstance(error, Exception):
        return " ".join(str(error).split("\n")) or type(error).__name__
    return type(error).__name__


_DRIVER: TypeAdapter[Driver] = TypeAdapter(Driver)
_STARTED: TypeAdapter[Started] = TypeAdapter(Started)
_COMMITTED: TypeAdapter[Committed] = TypeAdapter(Committed)

"""The bar of a merge that is asked for one: in a terminal, in a notebook, and as lines where neither is.

The engine prints nowhere else, and here only where the caller says ``progress=True``; the command line draws the same.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from mergemill.engine.runs.events import Event, OnEvent, PartFinished, Started
from mergemill.engine.runs.pace import Pace

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task

STEP_S = 0.2  # between two states of a notebook's bar
QUIET_S, SILENCE_S = 2.0, 30.0  # between two lines: at least, at most
STEP = 0.1  # of the whole: reason enough for a line
COLUMNS = (("share", 0), ("left", 46), ("rate", 58), ("sizes", 82), ("elapsed", 102), ("counts", 126))
"""What a bar says, and from how many columns of the terminal on: what tells most stays longest."""

Clock = Callable[[], float]


class Advance(Protocol):
    """Shows that so many bytes and parts are done."""

    def __call__(self, done_bytes: int, done: int, *, kept: bool = False) -> None:
        """kept: the last part was done before; it says nothing of the rate."""


@contextmanager
def show_progress(on_event: OnEvent, *, wanted: bool) -> Iterator[OnEvent]:
    """Give what tells of events, and, where that is wanted, moves a bar while the block lasts."""
    if not wanted:
        yield on_event
        return
    with ExitStack() as stack:
        advance: list[Advance] = []

        def tell(event: Event) -> None:
            if isinstance(event, Started):
                advance[:] = [stack.enter_context(open_bar(event.write_bytes, event.parts))]
            elif isinstance(event, PartFinished) and advance:
                advance[0](event.done_bytes, event.parts_done, kept=event.kept)
            on_event(event)

        yield tell


def open_bar(total_bytes: int, parts: int) -> AbstractContextManager[Advance]:
    """Show a bar where this process has a place for one, else lines, and the last state when the block ends."""
    if (display := find_display()) is not None:
        return _open_page(total_bytes, parts, display)
    if (console := find_terminal()) is not None:
        return open_terminal(total_bytes, parts, console)
    return open_lines(total_bytes, parts, write_line, ending=True)


def find_display() -> Callable[..., Any] | None:
    """Return IPython's `display` in a notebook, which has a kernel; None elsewhere."""
    shell = sys.modules.get("IPython")
    here = shell.get_ipython() if shell else None
    if here is None or not hasattr(here, "kernel"):
        return None
    from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

    return display  # type: ignore[no-any-return, unused-ignore]


def find_terminal() -> "Console | None":
    """Return the terminal that stderr is, on which a bar can move; None where it is none."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


class Meter:
    """Counts what is done, and how fast."""

    def __init__(self, total_bytes: int, parts: int, clock: Clock = time.monotonic) -> None:
        self._total_bytes, self._parts, self._clock = total_bytes, parts, clock
        self._started = self._counted = clock()  # the rate is that since the second
        self._done_bytes = self._done = self._kept_bytes = 0

    def advance(self, done_bytes: int, done: int, *, kept: bool = False) -> None:
        """So much is done; see `Advance`."""
        self._done_bytes, self._done = done_bytes, done
        if kept:
            self._counted, self._kept_bytes = self._clock(), done_bytes

    def read(self) -> Pace:
        """Return how it stands now."""
        now = self._clock()
        spent_s, made_bytes = now - self._counted, self._done_bytes - self._kept_bytes
        rate = made_bytes / spent_s if spent_s > 0 else 0.0
        return Pace(self._done_bytes, self._total_bytes, self._done, self._parts, now - self._started, rate)


@contextmanager
def open_terminal(total_bytes: int, parts: int, console: "Console") -> Iterator[Advance]:
    """Draw a bar that moves from the start, and whose columns fall away where the terminal is narrow, or becomes so."""
    from rich import progress

    class Said(progress.ProgressColumn):
        """One of the columns of words."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self._name = name

        def render(self, task: "Task") -> str:
            return str(getattr(task.fields["meter"].read(), self._name))

    class Fitting(progress.Progress):
        """The columns for which there is room."""

        def make_tasks_table(self, tasks: Any) -> Any:
            self.columns = (*bars, *(column for column, least in words if console.width >= least))
            return super().make_tasks_table(tasks)

    meter = Meter(total_bytes, parts)
    bars: list[ProgressColumn] = [progress.SpinnerColumn(finished_text=" "), progress.BarColumn(bar_width=16)]
    words = [(Said(name), least) for name, least in COLUMNS]
    with Fitting(console=console) as bar:
        task = bar.add_task("", total=None, meter=meter)  # which moves: nobody knows yet how fast it goes

        def advance(done_bytes: int, done: int, *, kept: bool = False) -> None:
            meter.advance(done_bytes, done, kept=kept)
            bar.update(task, total=total_bytes, completed=done_bytes)

        yield advance


@contextmanager
def _open_page(total_bytes: int, parts: int, display: Callable[..., Any]) -> Iterator[Advance]:
    meter = Meter(total_bytes, parts)
    handle = display(Page(meter.read()), display_id=True)
    shown_s, behind = time.monotonic(), False

    def advance(done_bytes: int, done: int, *, kept: bool = False) -> None:
        nonlocal shown_s, behind
        meter.advance(done_bytes, done, kept=kept)
        behind = time.monotonic() - shown_s < STEP_S
        if not behind:
            shown_s = time.monotonic()
            handle.update(Page(meter.read()))

    try:
        yield advance
    finally:
        if behind:
            handle.update(Page(meter.read()))


@contextmanager
def open_lines(
    total_bytes: int, parts: int, write: Callable[[str], None], *, ending: bool, clock: Clock = time.monotonic
) -> Iterator[Advance]:
    """Write a line with its time for each tenth of the whole or half minute, but two seconds apart.

    ending: whether the last state is written when the block ends.
    """
    meter, said_s, said_bytes, behind = Meter(total_bytes, parts, clock), clock(), 0, False

    def advance(done_bytes: int, done: int, *, kept: bool = False) -> None:
        nonlocal said_s, said_bytes, behind
        meter.advance(done_bytes, done, kept=kept)
        quiet_s = clock() - said_s
        behind = quiet_s < QUIET_S or (done_bytes - said_bytes < STEP * total_bytes and quiet_s < SILENCE_S)
        if not behind:
            said_s, said_bytes = clock(), done_bytes
            write(_stamp(meter.read()))

    try:
        yield advance
    finally:
        if ending and behind:
            write(_stamp(meter.read()))


def write_line(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(text + "\n")


def _stamp(pace: Pace) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {pace}"


class Page:
    """A state of a merge, as a line and as HTML."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def __repr__(self) -> str:
        return str(self._pace)

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._pace.done_bytes}" max="{max(self._pace.total_bytes, 1)}"></progress>'
        return f"<div>{bar} {escape(str(self._pace))}</div>"

"""The bar of a merge that is asked for one: in a terminal, in a notebook, and as lines where neither is.

The engine prints nowhere else, and here only where the caller says ``progress=True``.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from mergemill.engine.plan.sizes import format_size
from mergemill.engine.runs.events import Event, OnEvent, PartFinished, Started

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Advance = Callable[[int, int], None]
"""Shows that so many bytes and parts are done."""

STEP_S = 0.2  # between two states of a notebook's bar
LINE_S = 5.0  # between two lines, where nobody can see a bar move


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
                advance[0](event.done_bytes, event.parts_done)
            on_event(event)

        yield tell


@contextmanager
def open_bar(total_bytes: int, parts: int) -> Iterator[Advance]:
    """Show a bar where this process has a place for one, and the last state when the block ends."""
    display = find_display()
    if display is not None:
        with _open_page(total_bytes, parts, display) as advance:
            yield advance
    elif sys.stderr.isatty():
        with _open_terminal(total_bytes, parts) as advance:
            yield advance
    else:
        with _open_lines(total_bytes, parts) as advance:
            yield advance


def find_display() -> Callable[..., Any] | None:
    """Return IPython's `display` in a notebook, which has a kernel; None elsewhere."""
    shell = sys.modules.get("IPython")
    here = shell.get_ipython() if shell else None
    if here is None or not hasattr(here, "kernel"):
        return None
    from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

    return display  # type: ignore[no-any-return, unused-ignore]


def make_bar(console: "Console") -> "Progress":
    """Return a bar on `console`, whose tasks have a field `parts`; the command line draws the same."""
    from rich import progress

    return progress.Progress(
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[parts]}"),
        progress.TimeRemainingColumn(compact=True),
        console=console,
    )


@contextmanager
def _open_terminal(total_bytes: int, parts: int) -> Iterator[Advance]:
    from rich.console import Console

    with make_bar(Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes, parts=f"0/{parts} parts")
        yield lambda done_bytes, done: bar.update(task, completed=done_bytes, parts=f"{done}/{parts} parts")


@contextmanager
def _open_page(total_bytes: int, parts: int, display: Callable[..., Any]) -> Iterator[Advance]:
    handle = display(Page(0, 0, total_bytes, parts), display_id=True)
    with _spaced(STEP_S, lambda done_bytes, done: handle.update(Page(done_bytes, done, total_bytes, parts))) as advance:
        yield advance


@contextmanager
def _open_lines(total_bytes: int, parts: int) -> Iterator[Advance]:
    def write(done_bytes: int, done: int) -> None:
        sys.stderr.write(repr(Page(done_bytes, done, total_bytes, parts)) + "\n")

    with _spaced(LINE_S, write) as advance:
        yield advance


@contextmanager
def _spaced(least_s: float, show: Advance) -> Iterator[Advance]:
    """Show states not closer together than `least_s`, and the last one in any case."""
    shown_s, held = time.monotonic(), list[tuple[int, int]]()

    def advance(done_bytes: int, done: int) -> None:
        nonlocal shown_s
        held[:] = [(done_bytes, done)]
        if time.monotonic() - shown_s >= least_s:
            shown_s = time.monotonic()
            show(*held.pop())

    try:
        yield advance
    finally:
        if held:
            show(*held.pop())


class Page:
    """A state of a merge, as a line and as HTML."""

    def __init__(self, done_bytes: int, done: int, total_bytes: int, parts: int) -> None:
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        self._text = f"{format_size(done_bytes)} of {format_size(total_bytes)}, {done:,} of {parts:,} parts"

    def __repr__(self) -> str:
        return f"{self._done_bytes / max(self._total_bytes, 1):4.0%}  {self._text}"

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._done_bytes}" max="{max(self._total_bytes, 1)}"></progress>'
        return f"<div>{bar} {escape(self._text)}</div>"

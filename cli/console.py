"""All that reaches the terminal: lines, tables, JSON, progress and errors.

Results go to stdout; progress, warnings and errors to stderr. Colours and bars are for terminals only (and
NO_COLOR is respected); elsewhere the same words come as plain lines. Names of tensors, shards, models and drivers come
out of files that anybody may have written: every line goes through `show`.
"""

import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mergemill.engine import values
    from mergemill.engine.errors import FileFault

DEBUG = "MERGEMILL_DEBUG"
# What the system refuses and no code mends, and what helps where its own words do not say that.
_SURROUNDINGS = {
    errno.EACCES: "",
    errno.EDQUOT: "",
    errno.EIO: "",
    errno.EMFILE: "allow more of them with: ulimit -n 4096",
    errno.ENAMETOOLONG: "",
    errno.ENFILE: "",
    errno.ENOSPC: "",
    errno.EPERM: "",
    errno.EROFS: "",
    errno.ESTALE: "",
}
MOST_FAULTS = 20  # of a file that are shown
MOST_LINE, MOST_ERROR, MOST_CELL = 4000, 600, 400  # characters that are shown: of a line, an error, a table's cell
WIDE = 10_000  # columns: where nobody watches, no line is cut


def show(text: str, most: int) -> str:
    r"""Return a line as it may be shown, wherever its words come from.

    What is not printed as itself is escaped: control characters, which terminals obey, marks of direction, which turn
    around what is read, and bytes that were no UTF-8. Of more than `most` characters the middle is left out.

    >>> show("a\x1b]0;b\x07 \u202ec", 30)
    'a\\x1b]0;b\\x07 \\u202ec'
    >>> show("x" * 50, 30)
    'xxxxxxxxxxxxxxxxxx…xxxxxxxx'
    """
    if len(text) > most:
        head, tail = most * 6 // 10, most * 3 // 10
        text = f"{show(text[:head], most)}…{show(text[len(text) - tail + 1 :], most)}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str = "") -> None:
    """Write a line of the result: a line break that comes from a file makes no second one."""
    _write(show(text, MOST_LINE))


def say_whole(text: str) -> None:
    """Write the lines of a result however long they are: no text to read but to use."""
    _write(_show_lines(text, sys.maxsize))


def _write(text: str) -> None:
    with _naming_stdout():
        sys.stdout.write(text + "\n")


def _show_lines(text: str, most: int) -> str:
    return "\n".join(show(line, most) for line in text.split("\n"))


def count(number: int, noun: str) -> str:
    """Return a number of things.

    >>> count(1, "part"), count(2000, "part")
    ('1 part', '2,000 parts')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def say_json(value: object, *, indent: int | None = 2) -> None:
    """Write a result, or with ``indent=None`` an event of one line, as JSON."""
    lines = json.dumps(value, indent=indent, ensure_ascii=False, default=str).split("\n")
    _write("\n".join(line if line.isprintable() else _escape_json(line) for line in lines))
    flush()


def _escape_json(line: str) -> str:
    """Escape what is not printed as itself, which only texts can hold.

    >>> _escape_json('{"a": "\u202e \x9b"}')
    '{"a": "\\\\u202e \\\\u009b"}'
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def note(text: str) -> None:
    """Write a line about the work to stderr, see `say`."""
    _note(show(text, MOST_LINE))


def note_lines(text: str) -> None:
    """Write lines to stderr that are ours to break."""
    _note(_show_lines(text, MOST_LINE))


def _note(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:  # full, or nobody reads it: the work goes on, and the exit code tells of it
        _drop(sys.stderr)


def say_table(rows: Sequence[Sequence[str]], *, heads: Sequence[str] = (), right: Sequence[int] = ()) -> None:
    """Write rows of text as a table; the columns `right` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=WIDE, color_system=None)
    table = Table(box=None, show_header=bool(heads), pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=len(heads))):
        head = heads[column] if heads else ""
        table.add_column(head, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(cell, MOST_CELL)) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        _write(line.rstrip())


def say_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Write names and values a line each; a command among them can be copied whole, however wide the terminal is."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        say(f"{name:<{width}}  {value}")


def open_progress(total_bytes: int, parts: int) -> "AbstractContextManager[values.Advance]":
    """Show how far the work is while the block lasts: a bar on a terminal, else a line now and then."""
    from mergemill.engine import find_terminal, open_lines, open_terminal

    console = find_terminal()
    if console is None:
        return open_lines(total_bytes, parts, note, ending=False)
    return open_terminal(total_bytes, parts, console)


def show_error(error: BaseException) -> None:
    """Write an error as one line, and below it the lines of a user's file that are wrong.

    With ``MERGEMILL_DEBUG=1`` a traceback comes first.
    """
    if os.environ.get(DEBUG):
        note_lines("".join(traceback.format_exception(error)).rstrip("\n"))
    note(f"mergemill: error: {explain(error)}")
    faults = getattr(error, "faults", ())
    for fault in [fault for fault in faults if fault.text][:MOST_FAULTS]:
        note_lines("\n".join(_excerpt(fault, several=len(faults) > 1)))


def _excerpt(fault: "FileFault", *, several: bool) -> Iterator[str]:
    """Yield a line of a user's file with what is wrong in it underlined, and what that is where there is more."""
    margin = " " * len(str(fault.line))
    shown = "".join(c if c.isprintable() else " " for c in fault.text)  # as many columns
    said = f" {_one_line(fault.words)}" if several else ""
    yield f"  {fault.line} | {shown}"
    yield f"  {margin} | {' ' * fault.column}{'^' * max(1, fault.width)}{said}"


def show_stop(message: str) -> None:
    """Write that the work was stopped, and how to go on."""
    note(f"mergemill: {message}")


def explain(error: BaseException) -> str:
    """Return one line that says what went wrong; what nobody foresaw asks to be reported."""
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        hint = f"; {_SURROUNDINGS[error.errno]}" if _SURROUNDINGS[error.errno] else ""
        return _one_line(f"{error.filename or 'this process'}: {error.strerror}{hint}")
    if not is_expected(error):
        unforeseen = f"{type(error).__name__}: {error}"
        return f"{_one_line(unforeseen)}; this is a fault of mergemill: please report what {DEBUG}=1 shows"
    format_usage = getattr(error, "format_message", None)  # of Typer's own errors
    if format_usage is None:
        return _one_line(str(error))
    context = getattr(error, "ctx", None)
    hint = f"; see: {context.command_path} --help" if context else ""
    return _one_line(format_usage()).removesuffix(".") + hint


def is_expected(error: BaseException) -> bool:
    """Whether the error was raised on purpose: it knows its exit code."""
    return isinstance(getattr(error, "exit_code", None), int)


def _one_line(text: str) -> str:
    return show(" ".join(text.split("\n")), MOST_ERROR)


def error_event(error: BaseException) -> dict[str, Any]:
    """Return an error as an event of ``--json``; what is wrong in a file has its lines."""
    faults = [{"line": fault.line, "message": fault.words} for fault in getattr(error, "faults", ())]
    told = {"faults": faults} if faults else {}
    return {"event": "error", "message": explain(error), "exit_code": getattr(error, "exit_code", 1), **told}


def silence_libraries() -> None:
    """Keep logs and warnings of libraries off the terminal for the rest of the process."""
    if not os.environ.get(DEBUG):
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")


def flush() -> None:
    """Write out what is held back, so that a closed pipe is found here and not at the interpreter's end."""
    with _naming_stdout():
        sys.stdout.flush()


@contextmanager
def _naming_stdout() -> Iterator[None]:
    """Have an error of writing, but that of a closed pipe, say what could not be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


def drop_stdout() -> None:
    """Nobody can read stdout any more: let the rest go nowhere."""
    _drop(sys.stdout)


@contextmanager
def even_unheard() -> Iterator[None]:
    """Go on where what the block says cannot be written, to a stream that is full or that nobody reads any more."""
    try:
        yield
        flush()
    except OSError:
        drop_stdout()


def open_streams() -> None:
    """Give the process the standard streams that it was started without; else files of a merge would be those."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as the process lives


def _drop(stream: TextIO) -> None:
    """Have all that is still written to a stream go nowhere, what it holds back too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def restore_terminal() -> None:
    """Show the cursor again, which a bar hides."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")

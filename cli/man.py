"""``mergemill man``: the page of the manual, made of what ``--help`` says.

By a hundred lines of ours (2026-11-29): click-man knows click's own commands, and Typer brings its own copy of those.
The page is made when it is asked for, so that it is always that of the commands that are there.

Format: man-pages(7) and groff_man(7).
"""

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from mergemill.cli import console
from mergemill.cli.groups import group_parameters

ABOUT = "merge models that outgrow one machine"
ENDS = (
    ("0", "Done."),
    ("1", "The work failed; what was done is kept, and the same command goes on."),
    ("2", "The recipe, its inputs or the command line are wrong; nothing was written."),
    ("130, 143", "Stopped by Ctrl-C or by SIGTERM; the same command goes on."),
)
VARIABLES = (
    (
        "MERGEMILL_SOME_OPTION",
        "The value of --some-option, of any command that has it. MERGEMILL_MERGE_SOME_OPTION is of mergemill merge "
        "alone, and stronger; what is typed is stronger than both. A switch takes 1 or 0; an option that may come "
        "several times takes values with spaces between.",
    ),
    ("MERGEMILL_DEBUG", "With 1, errors come with a traceback, and logs of libraries are shown."),
    ("MERGEMILL_NATIVE", "With 0, merges are done by torch alone, slowly, with the same bytes."),
    ("NO_COLOR", "Where it is set, nothing is coloured."),
)


def man() -> None:
    """Print the page of the manual.

    Example: mergemill man > mergemill.1
    """
    from mergemill.cli.app import make_command

    console.say_whole("\n".join(list_lines(make_command())))


def list_lines(command: Any) -> Iterator[str]:
    """Yield the lines of the page of a command and of all below it, as roff."""
    yield f'.TH MERGEMILL 1 "" "mergemill {version("mergemill")}" "User Commands"'
    yield from (".SH NAME", f"mergemill \\- {ABOUT}")
    yield from (".SH SYNOPSIS", ".B mergemill", r"\fICOMMAND\fR [\fIOPTIONS\fR]")
    yield from (".SH DESCRIPTION", _escape(_read_help(command)[0]))
    yield ".SH COMMANDS"
    with _open(command, "mergemill", None) as context:
        for name, each in command.commands.items():
            yield from _list_command(each, name, context)
    yield ".SH EXIT STATUS"
    yield from _list_rows(ENDS)
    yield ".SH ENVIRONMENT"
    yield from _list_rows(VARIABLES)


def _list_command(command: Any, name: str, above: Any) -> Iterator[str]:
    """Yield what is said of a command: its words, its options by their groups, its example."""
    with _open(command, name, above) as context:
        if hasattr(command, "commands"):
            for inner, each in command.commands.items():
                yield from _list_command(each, inner, context)
            return
        pieces = command.collect_usage_pieces(context)
        yield from (f".SS {_escape(context.command_path)}", f"{_escape(' '.join(pieces))}", ".PP")
        about, example = _read_help(command)
        yield _escape(about)
        for heading, rows in group_parameters(command, context):
            yield from (".PP", f".B {_escape(heading)}")
            yield from _list_rows(rows)
        if example:
            yield from (".PP", ".B Example", ".RS", ".nf", _escape(example), ".fi", ".RE")


def _open(command: Any, name: str, above: Any) -> Any:
    """Return the context in which a command's help is written."""
    return command.make_context(name, [], parent=above, resilient_parsing=True)


def _list_rows(rows: Any) -> Iterator[str]:
    for name, about in rows:
        yield from (".TP", f".B {_escape(name)}", _escape(about) or r"\&")


def _read_help(command: Any) -> tuple[str, str]:
    """Return what a command's help says, as one paragraph, and its example."""
    about, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
    return " ".join(about.split()), example.strip()


def _escape(text: str) -> str:
    r"""Return text as roff has it: dashes that can be copied, and no line that begins with a request.

    >>> _escape(".x --raw \\ 'y'")
    "\\&.x \\-\\-raw \\e 'y'"
    """
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text

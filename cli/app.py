"""The commands, put together."""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.main import get_command

from mergemill.cli import console
from mergemill.cli.groups import GroupedCommand
from mergemill.cli.variables import OTHERS, PREFIX, find_misspelt, list_variables, name_variables

COMMANDS = (
    "merge",
    "transplant",
    "plan",
    "verify",
    "push",
    "inspect",
    "convert",
    "diff",
    "methods",
    "schema",
    "man",
    "evaluate",
    "sweep",
    "evolve",
    "soup",
    "cocktail",
    "results",
    "submit",
    "status",
    "attach",
    "cancel",
    "abort",
    "demo",
    "env",
    "extract-lora",
    "resize-lora",
    "ui",
)
"""In the order of the help; each is the function of its name in the module of its name."""
GROUPS = ("recipe",)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from mergemill.engine import describe_slowness

        console.say(f"mergemill {version('mergemill')}")
        if slowness := describe_slowness():
            console.note(f"warning: {slowness}")
        raise typer.Exit


def mergemill(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Merge models that outgrow one machine: out of core, on Dask, exact to the byte.

    Example: mergemill demo
    """
    if context.invoked_subcommand is None:
        console.note_lines(context.get_help())
        raise typer.Exit(2)


def make_command(first: str = "") -> Any:
    """Return the command line: every option has its variables of the environment.

    first: the first word that was given. Where it is a command, the others are not even imported, which takes longer
    than a small merge takes to plan.
    """
    app = typer.Typer(
        name="mergemill",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(mergemill)
    for name in (first,) if first in COMMANDS else COMMANDS:
        app.command(cls=GroupedCommand)(getattr(_import(name), name.replace("-", "_")))
    for name in () if first in COMMANDS else GROUPS:
        app.add_typer(_import(name).app)
    command = get_command(app)
    name_variables(command)
    return command


def warn_of_variables(environment: Mapping[str, str], command: Any) -> list[str]:
    """Return warnings of variables that are almost those of an option; all are asked where `command` has none such."""
    ours = {name for name in environment if name.startswith(f"{PREFIX}_")} - {*list_variables(command), *OTHERS}
    return list(find_misspelt(ours, list_variables(make_command()))) if ours else []


def _import(name: str) -> Any:
    return importlib.import_module(f"mergemill.cli.{name.replace('-', '_')}")

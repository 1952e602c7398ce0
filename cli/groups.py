"""The help of a command: its options below headings, as they belong together, in the order in which they stand."""

from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from mergemill.cli.variables import find_given, name_source

WORKERS, STORAGE, SHOWN = "Workers", "Storage", "What is shown"
"""The headings; options of the command itself stand above them, below ``Options``."""

OWN = "Options"
FROM_ENVIRONMENT = "--some-option may also be $MERGEMILL_SOME_OPTION in the environment, of every command that has it."


class GroupedCommand(TyperCommand):
    """A command whose help has its options in groups."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; what is wrong in a variable of the environment is told by its name."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            names = {option.name: variable for option, variable in find_given(ctx)}
            if error.param is not None and error.param.name in names:
                error.param_hint = names[error.param.name]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what is found wrong in a variable later is told by its name too."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(getattr(error, "exit_code", None), int) and error.args and isinstance(error.args[0], str):
                error.args = (name_source(ctx, error.args[0]), *error.args[1:])
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, and options below their headings."""
        for heading, rows in group_parameters(self, ctx):
            with formatter.section(heading):
                formatter.write_dl(rows)
        formatter.write_paragraph()
        formatter.write_text(FROM_ENVIRONMENT)


def group_parameters(command: Any, context: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each heading of a command's help, and what stands below it: names and explanations."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], OWN: [], WORKERS: [], STORAGE: [], SHOWN: []}
    for each in command.get_params(context):
        heading = "Arguments" if each.param_type_name == "argument" else each.rich_help_panel or OWN
        if row := each.get_help_record(context):
            found[heading].append(row)
    yield from ((heading, rows) for heading, rows in found.items() if rows)

"""The command `mergemill`: its commands, its signals, its exit codes.

0 done · 1 failed · 2 the recipe, its inputs or the command line are wrong · 130 Ctrl-C · 143 SIGTERM
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from mergemill.cli import abort, console, demo, inspect, merge, methods, plan, schema, signals, verify

app = typer.Typer(
    name="mergemill",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    merge.merge,
    plan.plan,
    verify.verify,
    inspect.inspect,
    methods.methods,
    schema.schema,
    abort.abort,
    demo.demo,
):
    app.command()(command)


def main() -> NoReturn:
    """Run the command line of this process."""
    console.silence_libraries()
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; whatever goes wrong is one line on stderr."""
    try:
        with signals.raise_interrupts():
            code = app(list(arguments), prog_name="mergemill", standalone_mode=False, obj=list(arguments))
            console.flush()
    except signals.Interrupted as stop:
        console.show_stop(str(stop))
        return stop.exit_code
    except BrokenPipeError:
        console.close_broken_pipe()
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence, and it says what it caught
        console.show_error(error)
        return int(getattr(error, "exit_code", 1))
    return int(code or 0)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.say(f"mergemill {version('mergemill')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def mergemill(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Merge models that outgrow one machine: out of core, on Dask, exact to the byte.

    Example: mergemill demo
    """
    if context.invoked_subcommand is None:
        console.note(context.get_help())
        raise typer.Exit(2)

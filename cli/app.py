"""The commands, put together."""

from typing import Annotated, Any

import typer
from typer.main import get_command

from mergemill.cli import (
    abort,
    attach,
    cancel,
    cocktail,
    console,
    convert,
    demo,
    diff,
    env,
    evaluate,
    evolve,
    extract_lora,
    inspect,
    man,
    merge,
    methods,
    plan,
    push,
    recipe,
    resize_lora,
    results,
    schema,
    soup,
    status,
    submit,
    sweep,
    transplant,
    verify,
)
from mergemill.cli.groups import GroupedCommand
from mergemill.cli.variables import name_variables

app = typer.Typer(
    name="mergemill",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    merge.merge,
    transplant.transplant,
    plan.plan,
    verify.verify,
    push.push,
    inspect.inspect,
    convert.convert,
    diff.diff,
    methods.methods,
    schema.schema,
    man.man,
    evaluate.evaluate,
    sweep.sweep,
    evolve.evolve,
    soup.soup,
    cocktail.cocktail,
    results.results,
    submit.submit,
    status.status,
    attach.attach,
    cancel.cancel,
    abort.abort,
    demo.demo,
    env.env,
    extract_lora.extract_lora,
    resize_lora.resize_lora,
):
    app.command(cls=GroupedCommand)(command)
app.add_typer(recipe.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from mergemill.engine import describe_slowness

        console.say(f"mergemill {version('mergemill')}")
        if slowness := describe_slowness():
            console.note(f"warning: {slowness}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
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


def make_command() -> Any:
    """Return the command line whole: every option has its variables of the environment."""
    command = get_command(app)
    name_variables(command)
    return command

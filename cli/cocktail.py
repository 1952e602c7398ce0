"""``mergemill cocktail``: models with weights that follow from their losses."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.merge import Quiet
from mergemill.cli.options import Cluster, Json, Memory, Scheduler, Threads, Workers
from mergemill.cli.searching import (
    Command,
    Examples,
    TextFile,
    Window,
    Windows,
    make_objective,
    show_trial,
    stopping,
)

if TYPE_CHECKING:
    from mergemill.engine import searches

Models = Annotated[list[str], typer.Argument(metavar="MODEL…", help="The models; the base may be among them.")]
Out = Annotated[str, typer.Option(metavar="OUT", help="A new folder; the losses are kept in OUT.search.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="The lower, the more the best counts.")]
Target = Annotated[str | None, typer.Option(metavar="MODEL", help="A model that gets the share alpha in any case.")]
Alpha = Annotated[float, typer.Option(min=0, max=1, metavar="A", help="Of the target.")]


def cocktail(
    context: typer.Context,
    models: Models,
    out: Out,
    text: TextFile = None,
    examples: Examples = None,
    window: Window = 512,
    windows: Windows = None,
    command: Command = None,
    temperature: Temperature = 5.0,
    target: Target = None,
    alpha: Alpha = 0.5,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge models by how well each does alone.

    Example: mergemill cocktail models/a models/b --out mixed --examples few.jsonl --temperature 1
    """
    from mergemill.engine import searches

    objective = make_objective(command, text, examples=examples, window=window, windows=windows)
    crew = make_crew(workers=workers, threads=threads, memory=memory, scheduler=scheduler, cluster=cluster)
    with stopping(context):
        made = searches.run_cocktail(
            models,
            out,
            objective,
            temperature=temperature,
            target=target,
            alpha=alpha,
            on_trial=show_trial(quiet=quiet),
            **crew,
        )
    if json:
        console.say_json({"losses": made.losses, "weights": made.weights})
    if json or quiet:
        return
    heads, rows = ["model", "loss", "weight"], list(_list_rows(models, made))
    heads += [f"at {each:g}" for each in searches.TEMPERATURES]
    console.say_table(rows, heads=heads, right=range(1, len(heads)))


def _list_rows(models: list[str], made: "searches.Cocktail") -> Iterator[list[str]]:
    """Yield for each model its loss, its weight, and what that would be at other temperatures."""
    from mergemill.engine import searches

    others = [searches.find_weights(made.losses, each) for each in searches.TEMPERATURES]
    for place, model in enumerate(models):
        shown = [made.weights[place], *(each[place] for each in others)]
        yield [model, f"{made.losses[place]:.6g}", *(f"{weight:.4f}" for weight in shown)]

"""``mergemill soup``: those of several models that are better together."""

from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.merge import Quiet
from mergemill.cli.options import Cluster, Json, Memory, Recipe, Scheduler, Threads, Workers
from mergemill.cli.recipes import open_recipe
from mergemill.cli.searching import (
    Command,
    Max,
    TextFile,
    Window,
    Windows,
    make_objective,
    show_trial,
    stopping,
)

NewFolder = Annotated[
    str, typer.Argument(metavar="OUT", help="A new folder; what is known meanwhile is kept in OUT.search.")
]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="How often the models that were left out are tried.")]


def soup(
    context: typer.Context,
    recipe: Recipe,
    out: NewFolder,
    text: TextFile = None,
    window: Window = 512,
    windows: Windows = None,
    command: Command = None,
    most: Max = False,
    rounds: Rounds = 1,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge those models that are better together.

    Example: mergemill soup recipe.yml mixed --text held.txt
    """
    from mergemill.engine import searches

    objective = make_objective(command, text, most=most, window=window, windows=windows)
    crew = make_crew(workers=workers, threads=threads, memory=memory, scheduler=scheduler, cluster=cluster)
    with stopping(context):
        made = searches.run_soup(
            open_recipe(recipe), out, objective, rounds=rounds, on_trial=show_trial(quiet=quiet), **crew
        )
    if json:
        console.say_json({"order": made.order, "kept": made.kept, "scores": made.scores})
    if json or quiet:
        return
    console.say(f"{out}: {len(made.kept)} of {console.count(len(made.order), 'model')}: {', '.join(made.kept)}")

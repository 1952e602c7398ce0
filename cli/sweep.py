"""``mergemill sweep``: all combinations of values of a recipe's variables."""

from typing import Annotated

import typer

from mergemill.cli.crew import make_crew
from mergemill.cli.evolve import Write
from mergemill.cli.merge import Quiet
from mergemill.cli.options import Cluster, Json, Memory, Scheduler, Threads, Workers
from mergemill.cli.searching import (
    Command,
    Folder,
    Max,
    TextFile,
    Window,
    Windows,
    make_objective,
    show_found,
    show_trial,
    stopping,
)

Vary = Annotated[
    list[str], typer.Option(metavar="NAME=…", help="from:to:step, the end included; or a,b,c. The first changes last.")
]


def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in which values are ${name}.")],
    folder: Folder,
    vary: Vary,
    text: TextFile = None,
    window: Window = 512,
    windows: Windows = None,
    command: Command = None,
    most: Max = False,
    write: Write = False,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Try all combinations of values.

    Example: mergemill sweep recipe.yml found --vary chat=0:1:0.25 --vary method=ties,sce --text held.txt
    """
    from mergemill.engine import searches

    file = searches.make_sweep(recipe, vary, make_objective(command, text, most=most, window=window, windows=windows))
    crew = make_crew(workers=workers, threads=threads, memory=memory, scheduler=scheduler, cluster=cluster)
    with stopping(context):
        found = searches.run_search(file, folder, write=write, on_trial=show_trial(quiet=quiet), **crew)
    show_found(found, folder, written=write, quiet=quiet, json=json)

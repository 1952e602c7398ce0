"""``mergemill evolve``: the best values of a recipe's variables, as a search file says how to find them."""

from typing import Annotated

import typer

from mergemill.cli.crew import make_crew
from mergemill.cli.merge import Quiet
from mergemill.cli.options import Cluster, Json, Memory, Scheduler, Threads, Workers
from mergemill.cli.searching import Folder, show_found, show_trial, stopping

Evaluations = Annotated[int | None, typer.Option(min=1, metavar="N", help="So many candidates, not as the file says.")]
Write = Annotated[bool, typer.Option("--write", help="Merge the best into DIR/model at the end.")]

OnBenchmarks = Annotated[bool, typer.Option("--on-benchmarks", help="Search on public test sets; the card tells.")]


def evolve(
    context: typer.Context,
    search: Annotated[str, typer.Argument(metavar="SEARCH", help="The YAML file that says what is searched.")],
    folder: Folder,
    evaluations: Evaluations = None,
    write: Write = False,
    on_benchmarks: OnBenchmarks = False,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Search for the best values of variables.

    Example: mergemill evolve search.yml found --evaluations 60 --write
    """
    from mergemill.engine import searches

    crew = make_crew(workers=workers, threads=threads, memory=memory, scheduler=scheduler, cluster=cluster)
    file = searches.load_search(search)
    with stopping(context):
        found = searches.run_search(
            file,
            folder,
            evaluations=evaluations,
            write=write,
            on_benchmarks=on_benchmarks,
            on_trial=show_trial(quiet=quiet),
            **crew,
        )
    show_found(found, folder, written=write, quiet=quiet, json=json)

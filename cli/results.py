"""``mergemill results``: what a search found so far, the best first."""

from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.options import Json
from mergemill.cli.searching import say_value


def results(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a search.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many of the best.")] = 10,
    recipe: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Write candidate N's recipe, as YAML, instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the best candidates of a search.

    Example: mergemill results found --top 5
    """
    from mergemill.engine import searches

    if recipe is not None:
        console.say_whole(searches.make_candidate(folder, recipe).rstrip("\n"))
        return
    trials, front = searches.read_results(folder)[:top], searches.read_front(folder)
    if json:
        for trial in trials:
            of_sum = {"front": trial.number in front} if front else {}
            console.say_json({**trial.to_json(), **of_sum}, indent=None)
        return
    names = list(trials[0].values) if trials else []
    failed = any(trial.error for trial in trials)
    rows = [
        [
            str(trial.number),
            searches.say_score(trial),
            *(["front" if trial.number in front else ""] if front else ()),
            searches.say_number(trial.holdout),
            *(say_value(trial.values[name]) for name in names),
            *([trial.error] if failed else ()),
        ]
        for trial in trials
    ]
    heads = ["number", "score", *(["of the"] if front else ()), "hold-out", *names, *(["why"] if failed else ())]
    console.say_table(rows, heads=heads, right=[0])

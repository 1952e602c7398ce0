"""What the commands of searches share: options, lines for each candidate, the end in words or JSON."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.merge import find_resume
from mergemill.cli.signals import Interrupted, raise_interrupts

if TYPE_CHECKING:
    from mergemill.engine import searches

Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="A folder for the search: new, empty, or this search unfinished.")
]
Command = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND", help="Judges by its last number: 'python score.py {model}'; or {recipe}, {values}."
    ),
]
Max = Annotated[bool, typer.Option("--max", help="More is better; else less is.")]


TextFile = Annotated[str | None, typer.Option("--text", metavar="FILE", help="Judges by the perplexity of this text.")]
Examples = Annotated[
    str | None, typer.Option(metavar="FILE", help="Judges by the loss of outputs: JSON lines of input and output.")
]
Window = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window of the text.")]
Windows = Annotated[int | None, typer.Option(min=1, metavar="N", help="So many at equal distances; else all.")]


def make_objective(
    command: str | None,
    text: str | None,
    *,
    examples: str | None = None,
    most: bool = False,
    window: int = 512,
    windows: int | None = None,
) -> "searches.Objective":
    """Return the objective that options say."""
    from mergemill.engine import searches

    if sum(each is not None for each in (command, text, examples)) != 1:
        also = ", --examples" if examples is not None else ""
        raise typer.BadParameter(f"say what is better, by one of --text{also} and --command")
    if most and command is None:
        raise typer.BadParameter("--max is for --command; of a text, less loss is better")
    if text is not None:
        return searches.Objective.model_validate({"perplexity": {"text": text, "window": window, "windows": windows}})
    if examples is not None:
        return searches.Objective.model_validate({"few_shot": {"examples": examples}})
    return searches.Objective(command=command, direction="max" if most else "min")


def show_trial(*, quiet: bool) -> "Callable[[searches.TrialFinished], None]":
    """Return what writes a line to stderr for each candidate."""

    def show(event: "searches.TrialFinished") -> None:
        if not quiet:
            with console.even_unheard():
                console.note(describe_trial(event))

    return show


def describe_trial(event: "searches.TrialFinished") -> str:
    """Return a candidate in one line."""
    from mergemill.engine import searches

    trial, best = event.trial, event.best
    values = ", ".join(f"{name} {say_value(value)}" for name, value in trial.values.items())
    outcome = f"failed: {trial.error}" if trial.score is None else searches.say_score(trial)
    outcome += f" at perplexity {searches.say_number(trial.perplexity)}" if trial.perplexity is not None else ""
    outcome += f" of {' and '.join(map(searches.say_number, trial.parts))}" if trial.parts else ""
    beside = f"; best {searches.say_score(best)}, number {best.number}" if best else ""
    if best is not None and best.number == trial.number:
        beside = "; the best so far"
    return f"{trial.number:4}  {outcome}{beside}{'; known already' if event.kept else ''}  ({values})"


def say_value(value: object) -> str:
    """Return a variable's value, of a gradient or a soup all of them."""
    from mergemill.engine import searches

    if isinstance(value, tuple | list):
        return f"[{', '.join(map(say_value, value))}]"
    return searches.say_number(value)


def show_found(found: "searches.Found", folder: str, *, written: bool, quiet: bool, json: bool) -> None:
    """Write what came of a search, quietly only as JSON; written: whether the best was merged."""
    from mergemill.engine import searches

    if json:
        console.say_json(to_json(found))
    if json or quiet:
        return
    best = found.best
    assert best is not None, "a search without a score ends with an error"
    values = ", ".join(f"{name} {say_value(value)}" for name, value in best.values.items())
    console.say(f"best: number {best.number}, {searches.say_score(best)} ({values})")
    if best.holdout is not None:
        console.say(f"hold-out: {searches.say_number(best.holdout)}")
    if found.front:
        console.say(f"front: {', '.join(map(_describe_point, found.front))}")
    judged = console.count(len(found.trials), "candidate")
    then = (
        f"the best is in {folder}/model" if written else f"merge the best with: mergemill merge {folder}/best.yml OUT"
    )
    console.say(f"{judged}, ended by {found.stopped}; {then}")


def _describe_point(trial: "searches.Trial") -> str:
    """Return a candidate of the front with the score of each item."""
    from mergemill.engine import searches

    return f"number {trial.number} ({', '.join(map(searches.say_number, trial.parts))})"


def to_json(found: "searches.Found") -> Mapping[str, Any]:
    """Return what came of a search as JSON values."""
    best = found.best
    told = best and {"number": best.number, "values": best.values, "score": best.score, "holdout": best.holdout}
    return {
        "best": told,
        "evaluations": len(found.trials),
        "failed": sum(trial.score is None for trial in found.trials),
        "bytes_read": sum(trial.bytes_read for trial in found.trials),
        "seconds": round(found.seconds, 3),
        "stopped": found.stopped,
        **({"front": [trial.number for trial in found.front]} if found.front else {}),
    }


@contextmanager
def stopping(context: typer.Context) -> Iterator[None]:
    """Say how to go on where a search is interrupted."""
    command, _ = find_resume(context)
    try:
        with raise_interrupts():
            yield
    except Interrupted as stop:
        raise Interrupted(stop.number, f"{stop}; the best so far is kept; go on with: {command}") from None

"""``mergemill evaluate``: what a model, or a merge that is not written, makes of a text."""

from dataclasses import asdict
from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.options import Cluster, Json, Scheduler, Workers
from mergemill.cli.recipes import open_recipe
from mergemill.cli.searching import Window, Windows

Given = Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="A model, or a recipe (….yml; - reads stdin).")]
TextFile = Annotated[str | None, typer.Option("--text", metavar="FILE", help="A text in UTF-8.")]
Examples = Annotated[str | None, typer.Option(metavar="FILE", help="Instead: JSON lines of input and output.")]
Stride = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens from one window to the next.")]
Whole = Annotated[bool, typer.Option("--whole", help="Take the whole model into memory: for families that need it.")]
LayerMemory = Annotated[str, typer.Option(metavar="SIZE", help="What may be taken beyond the process itself.")]


def evaluate(
    model: Given,
    text: TextFile = None,
    examples: Examples = None,
    window: Window = 512,
    stride: Stride = None,
    windows: Windows = None,
    memory: LayerMemory = "4GiB",
    whole: Whole = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Judge a model or a recipe on a text.

    Example: mergemill evaluate recipe.yml --text held.txt --windows 64
    """
    from mergemill.engine import evaluate, format_size, searches

    if (text is None) == (examples is None):
        raise typer.BadParameter("give one of --text and --examples")
    source = searches.TextSource(text or "", examples or "", window, stride, windows)
    crew = make_crew(workers=workers, memory=memory, scheduler=scheduler, cluster=cluster)
    found = evaluate(open_recipe(model) if model == "-" else model, source, whole=whole, **crew)
    if json:
        console.say_json({name: value for name, value in asdict(found).items() if name != "losses"})
        return
    error = f" ± {found.stderr:.2g}" if found.stderr is not None else ""
    scored = f"{console.count(found.tokens, 'token')} of {format_size(found.bytes)}"
    facts = [
        ("perplexity", f"{found.perplexity:.6g}{error if text else ''}"),
        ("loss", f"{found.nll:.6g} nats a token{error if examples else ''}"),
        ("bits per byte", f"{found.bits_per_byte:.6g}"),
        ("entropy", f"{found.entropy:.6g} nats a token"),
        ("scored", scored),
        ("read", f"{format_size(found.bytes_read)} in {found.seconds:.1f} s"),
    ]
    console.say_facts(facts)

"""``mergemill transplant``: a model with the tokenizer of another."""

from contextlib import ExitStack
from typing import Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.merge import JsonLines, NewOut, Public, Quiet, errors_as_events, run_plan
from mergemill.cli.options import (
    SHARD_SIZE,
    Cache,
    CacheFolder,
    Cluster,
    Memory,
    Overwrite,
    Reader,
    Scheduler,
    ShardSize,
    Threads,
    Wait,
    Workers,
)
from mergemill.cli.plan import plan_lines

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Whose weights: a folder, org/name, or a URL.")]
Donor = Annotated[str, typer.Argument(metavar="DONOR", help="Whose tokenizer.")]
Method = Annotated[str, typer.Option("--method", "-a", metavar="NAME", help="How rows of new tokens are made.")]
Terms = Annotated[int, typer.Option("--k", "-k", metavar="K", help="Rows that a new one is made of.")]
MetricOf = Annotated[
    str, typer.Option("--metric", "-c", metavar="NAME", help="Of common_interpolation: euclidean or cosine.")
]
WeightsOf = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME",
        help="Of common_interpolation: distance_proportional, barycentric or least_squares.",
    ),
]
SubwordOf = Annotated[
    str, typer.Option("--subword", "-s", metavar="NAME", help="Of subword: mean, sum, weighted_mean or first_last.")
]
Match = Annotated[str, typer.Option(metavar="NAME", help="When two tokens are the same: bytes, or text as mergekit.")]
ByteMatch = Annotated[
    str,
    typer.Option("--byte-match", metavar="WHERE", help="Tokens of one byte get the byte's: embed, lm_head, yes."),
]
PrefixMatch = Annotated[
    str, typer.Option("--prefix-match", metavar="WHERE", help="Tokens get their longest beginning's row: as before.")
]
Noise = Annotated[float, typer.Option(metavar="SIGMA", help="Added to new rows: its standard deviation.")]
ScaleOf = Annotated[float, typer.Option("--scale", metavar="S", help="New rows times this.")]
Multiple = Annotated[int, typer.Option("--pad-to-multiple-of", metavar="P", help="Rows of the output, rounded up.")]
RowsOf = Annotated[str, typer.Option("--rows", metavar="NAME", help="As many as the donor has, or as its tokens need.")]
SkipUnderTrained = Annotated[
    bool,
    typer.Option("--skip-under-trained", help="Nothing is made of tokens that were hardly trained; they are new rows."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of noise and random rows.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan alone, with how many tokens are what.")]
ReportOn = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Say the perplexity per byte of a text before and after, for each --method, as omp,mean; do nothing else.",
    ),
]
Tokens = Annotated[bool, typer.Option("--tokens", help="List what becomes of each token, and do nothing else.")]


def transplant(
    context: typer.Context,
    model: Model,
    donor: Donor,
    out: NewOut,
    method: Method = "omp",
    k: Terms = 64,
    metric: MetricOf = "euclidean",
    weights: WeightsOf = "distance_proportional",
    subword: SubwordOf = "mean",
    match: Match = "bytes",
    byte_match: ByteMatch = "no",
    prefix_match: PrefixMatch = "no",
    noise: Noise = 0.0,
    scale: ScaleOf = 1.0,
    pad_to_multiple_of: Multiple = 1,
    rows: RowsOf = "donor",
    skip_under_trained: SkipUnderTrained = False,
    seed: Seed = 0,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    wait: Wait = 0.0,
    cluster: Cluster = None,
    cache: Cache = None,
    cache_folder: CacheFolder = None,
    reader: Reader = None,
    public: Public = False,
    overwrite: Overwrite = False,
    shard_size: ShardSize = SHARD_SIZE,
    dry_run: DryRun = False,
    tokens: Tokens = False,
    report: ReportOn = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Give a model the tokenizer of another, or resume that.

    Example: mergemill transplant org/model org/donor transplanted --method omp
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        from mergemill.engine import make_transplant_plan, values

        crew = make_crew(
            workers=workers,
            threads=threads,
            memory=memory,
            scheduler=scheduler,
            wait=wait,
            cluster=cluster,
            cache=cache,
            cache_folder=cache_folder,
            reader=reader,
        )
        storage = values.WorkerOptions(**crew).find_storage()
        options: dict[str, Any] = {
            "method": method,
            "k": k,
            "metric": metric,
            "weights": weights,
            "subword": subword,
            "match": match,
            "byte_match": byte_match,
            "prefix_match": prefix_match,
            "noise": noise,
            "scale": scale,
            "pad_to_multiple_of": pad_to_multiple_of,
            "rows": rows,
            "skip_under_trained": skip_under_trained,
        }
        if tokens:
            _list_tokens(model, donor, storage, options, json=json)
            return
        if report is not None:
            _report(model, donor, report, {**options, "seed": seed}, memory, storage, json=json)
            return
        plan = make_transplant_plan(model, donor, seed=seed, shard_size=shard_size, storage=storage, **options)
        if dry_run:
            _show(plan, out, crew, json=json)
            return
        run_plan(context, stack, plan, out, crew, public=public, overwrite=overwrite, quiet=quiet, json=json)


def _show(plan: Any, out: str, crew: Any, *, json: bool) -> None:
    from mergemill.engine import describe_plan

    numbers = describe_plan(plan, out=out, **crew)
    if json:
        console.say_json(numbers)
        return
    for line in plan_lines(numbers):
        console.say(line)


def _list_tokens(model: str, donor: str, storage: Any, options: dict[str, Any], *, json: bool) -> None:
    """Print a line for each token of the donor: its id, what becomes of it in the embedding, and whose row it gets."""
    from mergemill.engine import list_transplanted

    for number, token, fate, own in list_transplanted(model, donor, storage, **options):
        if json:
            console.say_json({"id": number, "token": token, "kind": fate.kind, "row": fate.row, "of": own}, indent=None)
        else:
            console.say(f"{number:>7}  {fate.kind:<12}  {token!r}" + (f" = {fate.row} {own!r}" if own else ""))


def _report(
    model: str, donor: str, text: str, options: dict[str, Any], memory: str | None, storage: Any, *, json: bool
) -> None:
    """Print what a byte of a text costs before and after, for each method that is asked for."""
    from mergemill.engine import judge_transplants, searches

    methods = [each.strip() for each in options.pop("method").split(",")]
    found = judge_transplants(
        model, donor, searches.TextSource(text), methods, memory=memory, storage=storage, **options
    )
    if json:
        console.say_json(found)
        return
    console.say_facts([(name, f"{value:.4f} perplexity per byte") for name, value in found.items()])

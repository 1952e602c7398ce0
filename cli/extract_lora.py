"""``mergemill extract-lora``: the adapter by which a model differs from its base."""

from contextlib import ExitStack
from typing import Annotated

import typer

from mergemill.cli.crew import make_crew
from mergemill.cli.merge import JsonLines, NewOut, Public, Quiet, errors_as_events, run_plan
from mergemill.cli.options import (
    Cache,
    CacheFolder,
    Cluster,
    Memory,
    Overwrite,
    Reader,
    Scheduler,
    StorageOf,
    Threads,
    Wait,
    Workers,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model, or a recipe.yml that makes it, unwritten.")]
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model that the adapter is to be put onto.")]
MaxRank = Annotated[int, typer.Option("--max-rank", "--rank", min=1, metavar="R", help="Of each module, at most.")]
Energy = Annotated[float | None, typer.Option(metavar="SHARE", help="The least rank that keeps this share of ‖D‖².")]
Ratio = Annotated[float | None, typer.Option(metavar="SHARE", help="Singular values of this share of the largest.")]
Epsilon = Annotated[float, typer.Option(metavar="E", help="Singular values above this.")]
Budget = Annotated[str | None, typer.Option(metavar="SIZE", help="Of the file: ranks such that the least is lost.")]
Distribute = Annotated[bool, typer.Option(help="The roots of the singular values in A and B; else all in A.")]
Include = Annotated[
    list[str] | None, typer.Option("--include-regex", "-i", metavar="RE", help="Modules that are taken.")
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude-regex", "-e", metavar="RE", help="Modules to leave.")]
SaveModule = Annotated[list[str] | None, typer.Option(metavar="MODULE", help="Store it whole.")]
EmbedLora = Annotated[bool, typer.Option("--embed-lora", help="Decompose embeddings and heads too.")]
Skip = Annotated[bool, typer.Option("--skip-undecomposable", help="Leave out what is no matrix.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by the root of the rank (rsLoRA).")]
Dtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="To write, such as bfloat16; else the model's.")]
How = Annotated[str, typer.Option(metavar="WAY", help="gram, exact (an SVD), or randomized where neither fits.")]
Layout = Annotated[
    str | None, typer.Option(metavar="LAYOUT", help="separate: packed experts one by one; else as the base has them.")
]


def extract_lora(
    context: typer.Context,
    model: Model,
    base: Base,
    out: NewOut,
    max_rank: MaxRank = 128,
    energy: Energy = None,
    sv_ratio: Ratio = None,
    sv_epsilon: Epsilon = 0.0,
    budget: Budget = None,
    distribute_scale: Distribute = True,
    include_regex: Include = None,
    exclude_regex: Exclude = None,
    save_module: SaveModule = None,
    embed_lora: EmbedLora = False,
    skip_undecomposable: Skip = False,
    rslora: RsLora = False,
    dtype: Dtype = None,
    way: How = "gram",
    layout: Layout = None,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    wait: Wait = 0.0,
    cluster: Cluster = None,
    storage_as: StorageOf = None,
    cache: Cache = None,
    cache_folder: CacheFolder = None,
    reader: Reader = None,
    public: Public = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Extract an adapter of two models, or resume that.

    Example: mergemill extract-lora tuned base adapter --max-rank 32
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        from mergemill.engine import make_lora_plan, values

        crew = make_crew(
            workers=workers,
            threads=threads,
            memory=memory,
            scheduler=scheduler,
            wait=wait,
            cluster=cluster,
            storage_as=storage_as,
            cache=cache,
            cache_folder=cache_folder,
            reader=reader,
        )
        plan = make_lora_plan(
            model,
            base,
            memory=memory,
            max_rank=max_rank,
            energy=energy,
            sv_ratio=sv_ratio,
            sv_epsilon=sv_epsilon,
            budget=budget,
            distribute_scale=distribute_scale,
            include=tuple(include_regex or ()),
            exclude=tuple(exclude_regex or ()),
            save_modules=tuple(save_module or ()),
            embed_lora=embed_lora,
            skip_undecomposable=skip_undecomposable,
            rslora=rslora,
            dtype=dtype,
            way=way,
            layout=layout,
            storage=values.WorkerOptions(**crew).find_storage() or {},
        )
        run_plan(context, stack, plan, out, crew, public=public, overwrite=overwrite, quiet=quiet, json=json)

"""``mergemill resize-lora``: an adapter of a lower rank."""

from contextlib import ExitStack
from typing import Annotated

import typer

from mergemill.cli.crew import make_crew
from mergemill.cli.merge import JsonLines, NewOut, Public, Quiet, errors_as_events, run_plan
from mergemill.cli.options import Memory, Overwrite, StorageOf, Workers

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, a name on the Hub or a URL.")]
MaxRank = Annotated[int, typer.Option("--max-rank", "--rank", min=1, metavar="R", help="Of each module, at most.")]
Energy = Annotated[float | None, typer.Option(metavar="SHARE", help="The least rank that keeps this share of ‖D‖².")]
Dtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="To write, such as bfloat16; else the adapter's.")]


def resize_lora(
    context: typer.Context,
    adapter: Adapter,
    out: NewOut,
    max_rank: MaxRank,
    energy: Energy = None,
    dtype: Dtype = None,
    workers: Workers = None,
    memory: Memory = None,
    storage_as: StorageOf = None,
    public: Public = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Cut an adapter to a lower rank.

    Example: mergemill resize-lora adapter smaller --max-rank 16
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        from mergemill.engine import make_adapter_plan, values

        crew = make_crew(workers=workers, memory=memory, storage_as=storage_as)
        cut: dict[str, object] = {"combination_type": "svd", "parameters": {"svd_rank": max_rank}}
        if energy is not None:
            rank = {"energy": energy, "max_rank": max_rank}
            cut = {"merge_method": "linear", "parameters": {"weight": 1.0}, "space": "core", "rank": rank}
        document = {"adapters": [{"adapter": adapter}], **cut, **({"dtype": dtype} if dtype else {})}
        plan = make_adapter_plan(document, storage=values.WorkerOptions(**crew).find_storage(), memory=memory)
        run_plan(context, stack, plan, out, crew, public=public, overwrite=overwrite, quiet=quiet, json=json)

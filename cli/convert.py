"""``mergemill convert``: a model in another dtype, quantised, or no more quantised."""

from contextlib import ExitStack
from typing import Annotated

import typer

from mergemill.cli.crew import make_crew
from mergemill.cli.merge import JsonLines, Public, Quiet, errors_as_events, run_plan
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
    StorageOf,
    Threads,
    Wait,
    Workers,
)

To = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="A folder, s3://… or hf://org/name: new, empty, or this unfinished. FOLDER/model.gguf: a file of GGUF.",
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model as in a recipe: a folder, s3://…, org/name, model+adapter.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="float32, float16, bfloat16, float64: of all that is not quantized.")
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="SCHEME", help="fp8_block: FP8 in blocks of 128 x 128; mxfp4: for gpt-oss; q8_0: for GGUF."),
]


def convert(
    context: typer.Context,
    model: Model,
    out: To,
    dtype: Dtype = None,
    quantize: Quantize = None,
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
    shard_size: ShardSize = SHARD_SIZE,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Write a model in another dtype, quantized, or as GGUF.

    Example: mergemill convert models/chat chat-fp8 --quantize fp8_block
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        from mergemill.engine import make_convert_plan, values

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
        reached = values.WorkerOptions(**crew).find_storage()
        folder, file_name = split_file(out)
        plan = make_convert_plan(
            model, dtype=dtype, quantize=quantize, gguf=file_name, shard_size=shard_size, storage=reached
        )
        run_plan(context, stack, plan, folder, crew, public=public, overwrite=overwrite, quiet=quiet, json=json)


def split_file(out: str) -> tuple[str, str | None]:
    """Return where an output is, and the name of its one file, where that is asked for.

    >>> split_file("models/chat.gguf"), split_file("s3://b/chat"), split_file("chat.gguf")
    (('models', 'chat.gguf'), ('s3://b/chat', None), ('.', 'chat.gguf'))
    """
    if not out.endswith(".gguf"):
        return out, None
    folder, _, name = out.rpartition("/")
    return folder or ("/" if out.startswith("/") else "."), name

"""``mergemill submit``: run the driver of a merge inside the cluster, and return."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.completion import complete_cluster
from mergemill.cli.options import (
    DEVICE_MEMORY,
    SHARD_SIZE,
    Cache,
    CacheFolder,
    Device,
    DeviceMemory,
    Intersection,
    Json,
    Memory,
    Methods,
    Out,
    Overwrite,
    Raw,
    Reader,
    Recipe,
    RoundStages,
    Seed,
    ShardSize,
    Union,
    say_storage,
)
from mergemill.cli.raw import check_raw
from mergemill.cli.recipes import open_recipe
from mergemill.cli.status import run_in
from mergemill.cli.variables import list_words

Where = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="A cluster file of kind slurm or kubernetes.",
        autocompletion=complete_cluster,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted.")]


def submit(
    context: typer.Context,
    recipe: Recipe,
    out: Out,
    cluster: Where,
    memory: Memory = None,
    device: Device = None,
    device_memory: DeviceMemory = DEVICE_MEMORY,
    cache: Cache = None,
    cache_folder: CacheFolder = None,
    reader: Reader = None,
    shard_size: ShardSize = SHARD_SIZE,
    seed: Seed = 0,
    methods: Methods = None,
    raw: Raw = False,
    union: Union = False,
    intersection: Intersection = False,
    round_stages: RoundStages = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run a merge inside a cluster, and return at once.

    Example: mergemill submit recipe.yml /shared/merged --cluster slurm
    """
    from mergemill.engine import jobs, load_cluster

    options = {"--memory": memory, "--cache": cache, "--cache-folder": cache_folder, "--reader": reader}
    options |= {"--device": device, "--device-memory": device_memory if device_memory != DEVICE_MEMORY else None}
    options |= {"--shard-size": shard_size if shard_size != SHARD_SIZE else None, "--seed": str(seed) if seed else None}
    check_raw(raw=raw, union=union, intersection=intersection)
    flags = {
        "--raw": raw,
        "--union": union,
        "--intersection": intersection,
        "--round-stages": round_stages,
        "--overwrite": overwrite,
    }
    words = list_words(context)
    loaded, file = open_recipe(recipe), load_cluster(cluster)
    job = jobs.make_job(
        loaded,
        out,
        file,
        cluster=str(Path(cluster).absolute()) if Path(cluster).suffix in (".yml", ".yaml") else cluster,
        arguments=[*_list_words(options, methods or ()), *(flag for flag, given in flags.items() if given)],
        folder=Path.cwd(),
        resume=run_in(str(Path.cwd()), shlex.join(["mergemill", *(word for word in words if word != "--dry-run")])),
    )
    if dry_run:
        if json:
            console.say_json({"kind": job.kind, "out": out, "text": job.text})
        else:
            console.say_whole(job.text.rstrip("\n"))
        return
    reach = say_storage(recipe if loaded.storage else None, cluster if file.storage else None)
    name, place = jobs.submit_job(job), f"{shlex.quote(out)}{reach}"
    if json:
        console.say_json({"kind": job.kind, "job": name, "out": out})
        return
    console.say(f"{job.kind} job {name} merges into {out}")
    console.say(
        f"see: mergemill status {place}; watch: mergemill attach {place} --wait 3600; end: mergemill cancel {place}"
    )


def _list_words(options: dict[str, str | None], methods: list[str] | tuple[()]) -> Iterator[str]:
    from mergemill.engine import jobs

    for name, value in options.items():
        if value is not None:
            yield from (name, value)
    for path in methods:
        yield from ("--methods", jobs.find_methods(path))

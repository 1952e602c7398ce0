"""Arguments and options that several commands share."""

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mergemill.cli.completion import complete_cluster, complete_device, complete_recipe
from mergemill.cli.groups import SHOWN, STORAGE, WORKERS

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="The YAML file that says what to merge; - reads stdin.", autocompletion=complete_recipe
    ),
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Where the merge is: a folder, s3://… or hf://org/name.")]
StorageAs = Annotated[
    str | None,
    typer.Option(
        "--storage-as",
        metavar="RECIPE",
        help="Reach it as this recipe's storage_options say.",
        rich_help_panel=STORAGE,
        autocompletion=complete_recipe,
    ),
]
StorageOf = Annotated[
    str | None,
    typer.Option(
        "--storage-as",
        metavar="NAME|FILE",
        help="Reach storage as this cluster file says, beside the recipe's options; else as --cluster says.",
        rich_help_panel=STORAGE,
        autocompletion=complete_cluster,
    ),
]
ClusterAs = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="Reach it as this cluster file's options say.",
        rich_help_panel=STORAGE,
        autocompletion=complete_cluster,
    ),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Merge dictionaries of tensors by name: no config, no layers."),
]
Union = Annotated[
    bool, typer.Option("--union", "-u", "--tensor-union", help="With --raw: each tensor over the models that have it.")
]
Intersection = Annotated[
    bool,
    typer.Option("--intersection", "-i", "--tensor-intersection", help="With --raw: only what all models have."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Promised to each worker, such as 512MiB; else the cluster file's, or 1GiB.",
        rich_help_panel=WORKERS,
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of an output file, or 'tensor'.")]
KeepStages = Annotated[
    str | None, typer.Option(metavar="DIR", help="Write all stages too, below their names, each as a merge of its own.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished merge that is there; never anything else.")
]
RoundStages = Annotated[
    bool, typer.Option("--round-stages", help="Round each stage as a file of it would be, for the bytes of one by one.")
]
Tokens = Annotated[
    bool,
    typer.Option("--tokens", help="List new tokens, and the rows that models without one get.", rich_help_panel=SHOWN),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the random methods' masks.")]
Workers = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Processes; 0: threads of this one.", rich_help_panel=WORKERS)
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads of each worker.", rich_help_panel=WORKERS)
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        "--scheduler-file",
        metavar="ADDRESS|FILE",
        envvar="DASK_SCHEDULER_ADDRESS",
        help="Of a Dask cluster that is there already: tcp://… or tls://…, or its scheduler file; "
        "else $DASK_SCHEDULER_ADDRESS.",
        rich_help_panel=WORKERS,
    ),
]
Wait = Annotated[
    float,
    typer.Option(
        min=0, metavar="SECONDS", help="Wait so long for a scheduler that does not answer yet.", rich_help_panel=WORKERS
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A cluster file (….yml), or a built-in one: what to start for the merge.",
        rich_help_panel=WORKERS,
        autocompletion=complete_cluster,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="What each worker merges on: cpu (the default), cuda, xpu, mps; auto: one that is there, for methods on "
        "whole matrices. Not run on a GPU yet: see the README.",
        rich_help_panel=WORKERS,
        autocompletion=complete_device,
    ),
]
DeviceMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="Promised to each worker, of its device.", rich_help_panel=WORKERS)
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Keep so much of remote sources on this disk for later merges, such as 50GB.",
        rich_help_panel=STORAGE,
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where that is kept; else ~/.cache/mergemill, or $XDG_CACHE_HOME.",
        rich_help_panel=STORAGE,
    ),
]
Reader = Annotated[
    str | None,
    typer.Option(
        metavar="READER",
        help="How weights are read: direct, or fsspec, slower, where direct has trouble with storage.",
        rich_help_panel=STORAGE,
    ),
]
Methods = Annotated[
    list[str] | None, typer.Option("--methods", metavar="FILE", help="A Python file of your own merge methods.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.", rich_help_panel=SHOWN)]

SHARD_SIZE = "5GB"
DEVICE_MEMORY = "4GiB"


def say_storage(recipe: str | None, cluster: str | None = None) -> str:
    """Return the options that name these two to another command, with a space before each; empty where there are none.

    >>> say_storage("a recipe.yml", None)
    " --storage-as 'a recipe.yml'"
    """
    given = {"--storage-as": recipe, "--cluster": cluster}
    return "".join(f" {option} {shlex.quote(value)}" for option, value in given.items() if value)


def read_storage(recipe: str | None, cluster: str | None = None) -> Mapping[str, Mapping[str, Any]] | None:
    """Return how a merge of this recipe, on the cluster of this file, reaches storage; None where neither is named."""
    from mergemill.engine import load_storage

    return load_storage(recipe, cluster)

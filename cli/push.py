"""``mergemill push``: a finished merge becomes a repository of the Hub."""

from dataclasses import asdict
from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.groups import STORAGE
from mergemill.cli.options import ClusterAs, Json, StorageAs, read_storage

FinishedOut = Annotated[str, typer.Argument(metavar="OUT", help="Where the merge is: a folder or s3://….")]
Repository = Annotated[str, typer.Argument(metavar="ORG/NAME", help="A new repository, or one without a model.")]
Public = Annotated[
    bool, typer.Option("--public", help="Let everybody see a repository made on the Hub.", rich_help_panel=STORAGE)
]


def push(
    out: FinishedOut,
    repository: Repository,
    public: Public = False,
    storage_as: StorageAs = None,
    cluster: ClusterAs = None,
    json: Json = False,
) -> None:
    """Publish a finished merge on the Hub, or go on with that.

    Example: mergemill push merged org/merged
    """
    from mergemill.engine import format_size
    from mergemill.engine import push as push_merge

    pushed = push_merge(
        out, repository, public=public, storage_options=read_storage(storage_as, cluster), on_file=_tell
    )
    if json:
        console.say_json(asdict(pushed))
        return
    sent = f", {format_size(pushed.sent_bytes)} of them sent now" if pushed.sent_bytes < pushed.bytes else ""
    console.say(f"{pushed.repository}: {console.count(pushed.files, 'file')}, {format_size(pushed.bytes)}{sent}")


def _tell(name: str, number: int, count: int) -> None:
    console.note(f"uploading {name} ({number} of {count})")

"""``mergemill cancel``: end a merge that runs somewhere, so that it can be resumed."""

from dataclasses import asdict
from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, Out, StorageAs, read_storage
from mergemill.cli.status import say_progress, say_resume

Wait = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for its end; 0: do not.")]


def cancel(
    out: Out, wait: Wait = 120.0, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False
) -> None:
    """Ask a merge that runs anywhere to end; it can be resumed.

    Example: mergemill cancel s3://bucket/merged
    """
    from mergemill.engine import cancel as cancel_merge

    found = cancel_merge(out, wait_s=wait, storage_options=read_storage(storage_as, cluster))
    if json:
        console.say_json(asdict(found))
    elif found.state == "finished" and found.old:
        console.say(f"{found.out}: cancelled; the finished merge there, which it was to replace, is whole")
    elif found.state == "finished":
        console.say(f"{found.out}: was finished before it could be cancelled")
    elif found.state == "unfinished":
        console.say(f"{found.out}: cancelled{say_progress(found)}; go on with: {say_resume(found)}")
    else:
        console.say(f"{found.out}: is asked to end{say_progress(found)}")

"""``mergemill verify``: whether a finished merge is still what was written."""

from dataclasses import asdict
from typing import Annotated

import typer

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, Out, StorageAs, read_storage

Replay = Annotated[int, typer.Option(min=0, metavar="K", help="Merge K parts again, and compare.")]


def verify(
    out: Out, replay: Replay = 0, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False
) -> None:
    """Check a finished merge against its receipts.

    Example: mergemill verify merged --replay 3
    """
    from mergemill.engine import format_size, list_code
    from mergemill.engine import verify as verify_merge

    storage = read_storage(storage_as, cluster)
    code = list_code(out, storage_options=storage) if replay else ()
    for name, sha256 in code:
        console.note(f"merging again runs the code of {name} (sha256 {sha256}), as {out} keeps it")
    told = [sha256 for _, sha256 in code]
    verified = verify_merge(out, replay=replay, run_code=told, storage_options=storage)
    if json:
        console.say_json(asdict(verified))
        return
    counts = {"shard": verified.shards, "part": verified.parts, "small file": verified.files}
    found = [format_size(verified.bytes), *(console.count(number, noun) for noun, number in counts.items())]
    replayed = f"; {console.count(verified.replayed, 'part')} merged again" if replay else ""
    console.say(f"{verified.out}: as it was written: {', '.join(found)}{replayed}")

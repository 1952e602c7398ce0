"""What a merge moves to and from remote storage, known from the plan: bytes and requests.

What they cost is not said (2026-11-29): nobody can keep such prices true, and a number in dollars is taken for a bill.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mergemill.engine.plan.memory import task_bytes
from mergemill.engine.plan.values import Part, Piece, Plan
from mergemill.engine.runs.tasks.together import iter_groups, join_reads
from mergemill.engine.storage.fetch import PIECE_BYTES
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.tensors.expressions import Read
from mergemill.engine.tensors.slabs import SLAB

_S3 = ("s3://", "s3a://")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What goes to and from the stores of one kind; headers, lists and what is tried again are left out."""

    scheme: str  # of their URLs
    read_bytes: int  # when every input is read once, as with a cache, or with memory for all that is read again
    read_requests: int
    most_read_bytes: int  # when every pass over inputs that do not fit the memory is made, and reads them
    most_read_requests: int
    write_bytes: int
    write_requests: int


def find_traffic(plan: Plan, share_bytes: int, out: str | None = None) -> list[Traffic]:
    """Return what a merge moves by tasks of `share_bytes`, by the schemes of the URLs; `out`, where that is known."""
    once, most = Counter[str](), Counter[str]()
    requests, most_requests = Counter[str](), Counter[str]()
    for read, passes in _iter_reads(plan, share_bytes, out or ""):
        scheme, pieces = read.pin.url.partition("://")[0], -(-read.size_bytes // PIECE_BYTES)
        once[scheme] += read.size_bytes
        most[scheme] += read.size_bytes * passes
        requests[scheme] += pieces
        most_requests[scheme] += pieces * passes
    written = {out.partition("://")[0]} if out is not None and is_remote(out) else set()
    return [
        Traffic(
            scheme,
            once[scheme],
            requests[scheme],
            most[scheme],
            most_requests[scheme],
            plan.write_bytes if scheme in written else 0,
            _count_writes(plan, scheme) if scheme in written else 0,
        )
        for scheme in sorted({*once, *written})
    ]


def _iter_reads(plan: Plan, share_bytes: int, out: str) -> Iterator[tuple[Read, int]]:
    """Yield each remote range that is read, and how often at most; not what S3 itself copies to `out`."""
    if not any(is_remote(pin.url) for pin in plan.pins):
        return
    for part in plan.parts:
        if out.startswith(_S3) and _is_copied(part):
            continue
        need_bytes = task_bytes(part, share_bytes)
        for group in iter_groups(part.pieces, need_bytes, SLAB, alone=False):
            passes = _count_passes(group[0], need_bytes) if len(group) == 1 else 1
            passes += plan.scaling is not None and group[0].tensor.expression.is_merged
            for read in join_reads(group):
                if is_remote(read.pin.url):
                    yield read, passes


def _count_passes(piece: Piece, need_bytes: int) -> int:
    """Return how often a task that has `need_bytes`, and those before it, go over a piece's inputs, at most."""
    if piece.whole and piece.projected.keep_bytes <= need_bytes:
        return 1
    return 1 + piece.projected.most_rounds


def _is_copied(part: Part) -> bool:
    from mergemill.engine.runs.outputs.copies import find_stretches  # which needs boto3

    return find_stretches(part, 0) is not None


def _count_writes(plan: Plan, scheme: str) -> int:
    """Return about how many requests write the output."""
    if scheme == "hf":
        return 2 * len(plan.shards) + 1  # the last is the commit
    if f"{scheme}://" in _S3:
        from mergemill.engine.runs.outputs.chunks import count_chunks

        chunks = sum(count_chunks(part.size_bytes) for part in plan.parts)
    else:
        from mergemill.engine.storage.streams import BLOCK_BYTES

        chunks = sum(-(-shard.size_bytes // BLOCK_BYTES) for shard in plan.shards)
    return chunks + 2 * len(plan.shards) + len(plan.files)

"""Small tensors of one size and kind that lie side by side in a part: read, merged and written in one go.

What Python does for a slab it does then for many tensors; each still has its own rounds, settings and drift, so that
the bytes are those of each merged alone.
"""

from collections.abc import Iterator, Sequence

from mergemill.engine.plan.memory import TOGETHER_BYTES, end_bytes
from mergemill.engine.plan.values import Piece
from mergemill.engine.runs.tasks.guard import Row, to_row
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import read_ahead
from mergemill.engine.tensors.expressions import Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.merged import are_fused_together, fuse_together, merge_company
from mergemill.engine.tensors.rounds import Ready, Round, finish_rounds
from mergemill.engine.tensors.workspace import Arena, Workspace


def iter_groups(pieces: Sequence[Piece], memory_bytes: int, slab: int, *, alone: bool) -> Iterator[Sequence[Piece]]:
    """Yield a part's pieces in order: those that are merged in one go together, each other one `alone`, as all may be.

    What a group holds of inputs and outputs leaves room for what one of its tensors takes.
    """
    group: list[Piece] = []
    company, left_bytes = None, 0
    for piece in pieces:
        own = None if alone else _find_company(piece, slab)
        taken_bytes = end_bytes(piece)
        if own is None or own != company or taken_bytes > left_bytes:
            if group:
                yield group
            group, company = [], own
            left_bytes = min(memory_bytes - piece.projected.slab_bytes, TOGETHER_BYTES)
        group.append(piece)
        left_bytes -= taken_bytes
    if group:
        yield group


def _find_company(piece: Piece, slab: int) -> object:
    """Return what is equal for pieces that may be merged in one go; None where the piece is merged alone."""
    tensor = piece.tensor
    if not piece.whole or piece.span.size > slab or tensor.most_growth is not None:
        return None
    company = tensor.expression.find_company(tensor.dtype)
    return company and (company, piece.projected.slab_bytes)


def merge_together(
    pieces: Sequence[Piece], work: Workspace, workplace: Workplace, drifts: list[Row]
) -> Iterator[tuple[int, Arena]]:
    """Yield where in the shard the bytes of the pieces belong, and these, which are gone with the next."""
    workplace.check_going()
    _read_inputs(pieces, work)
    dtype, span = pieces[0].tensor.dtype, pieces[0].span
    made = merge_company([piece.tensor.expression for piece in pieces], span, work, dtype)
    if made is not None:
        yield pieces[0].offset_bytes, made[0]
        drifts.extend(to_row(drift, kept_base=False) for drift in made[1])
        return
    ready = [_settle(piece, work) for piece in pieces]
    watches = [watch for each in ready if (watch := each.make_watch(dtype)) is not None]
    work.next_slab()
    if are_fused_together(ready):
        yield pieces[0].offset_bytes, fuse_together(ready, span, work, dtype, watches)
    else:
        for piece, each, watch in zip(pieces, ready, watches, strict=True):
            yield piece.offset_bytes, each.encode(span, work, dtype, watch)
            work.next_slab()
    drifts.extend(to_row(watch.drift(), kept_base=False) for watch in watches)


def _settle(piece: Piece, work: Workspace) -> Ready:
    """Return what is ready once the rounds of the one slab have been gone through."""

    def gather(asked: Round) -> Partial:
        work.next_slab()
        return asked.take(piece.span, work, ())

    return finish_rounds(piece.tensor.expression.rounds(), (), gather)


def join_reads(pieces: Sequence[Piece]) -> list[Read]:
    """Return what the pieces read, ranges that lie side by side as one."""
    wanted = dict.fromkeys(read for piece in pieces for read in piece.tensor.expression.reads(piece.span))
    joined: list[Read] = []
    for read in sorted(wanted, key=lambda each: (each.pin.url, each.offset_bytes, each.size_bytes)):
        last = joined[-1] if joined else None
        if last and last.pin.url == read.pin.url and last.offset_bytes + last.size_bytes == read.offset_bytes:
            joined[-1] = Read(last.pin, last.offset_bytes, last.size_bytes + read.size_bytes)
        else:
            joined.append(read)
    return joined


def _read_inputs(pieces: Sequence[Piece], work: Workspace) -> None:
    """Read what the pieces read."""
    joined = [(read.pin, read.offset_bytes, read.size_bytes) for read in join_reads(pieces)]
    for each in joined:
        work.hold(*each)
        read_ahead(*each)
    for each in joined:
        work.read_array(*each)

"""One piece of an output tensor: its statistics, its merge, and how far it drifts from its base, slab by slab.

Elements of a slab are read, decoded, merged, encoded, and given on to be written while they lie in the core's cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mergemill.engine.plan.memory import gather_bytes, slab_bytes
from mergemill.engine.plan.stages import Scaling
from mergemill.engine.plan.values import Part, Piece
from mergemill.engine.runs.tasks.guard import Row, find_fault, is_cast, to_row
from mergemill.engine.runs.worker.aboard import combine_there, find_device_staging, merge_there, open_work
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage.ranges import read_ahead
from mergemill.engine.tensors.ahead import fetch_ahead
from mergemill.engine.tensors.drift import Drift, Watch, make_drift
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.expressions import Agreed, Expression, Held, Stored
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather, Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.slabs import SLAB, STORED_SLABS, Span, iter_slabs
from mergemill.engine.tensors.workspace import Arena, Workspace

Totals = Mapping[str, Sequence[Partial]]  # of cut tensors: what their rounds gathered, by output tensor

AHEAD = 32 * SLAB  # elements of each input that the kernel is asked to read ahead


def merge_piece(
    piece: Piece,
    totals: Totals,
    work: Workspace,
    workplace: Workplace,
    slab: int = SLAB,
    drifts: list[Row] | None = None,
) -> Iterator[tuple[Span, Arena]]:
    """Yield the piece's slabs, each with its output bytes, which are gone with the next.

    With `drifts`, what the guard saw of a merged or cast piece is added to them at the end.
    """
    on_cpu = slab
    slab = slab if work.lanes is None else work.lanes.staging.slab
    statistics = _find_statistics(piece, totals, work, workplace, slab)
    block = piece.tensor.expression.block  # also for a base that is kept: its ranges then are those that were read
    watch = _make_watch(piece) if drifts is not None else None
    row: Row | None = None
    if piece.tensor.most_growth is not None and (
        drift := _find_drift(piece, statistics, totals, work, workplace, slab)
    ):
        kept = bool(find_fault(drift, piece.tensor.most_growth))
        row = to_row(drift, kept_base=kept) if piece.span.start == 0 else []  # the whole tensor's, said once
        if kept:
            work.leave_device()
            piece, slab = _with_base(piece), on_cpu
        watch = None
    if work.lanes is not None:
        yield from merge_there(piece, statistics, _iter_slabs(piece, work, workplace, slab, block), work, watch)
    else:
        fusion = _fuse(piece, statistics)
        for span in _iter_slabs(piece, work, workplace, slab * STORED_SLABS if fusion else slab, block):
            yield span, _make_bytes(piece, span, statistics, fusion, work, watch)
    if watch is not None:
        row = to_row(watch.drift(), kept_base=False)
    if drifts is not None and row is not None:
        drifts.append(row)


def gather_piece(piece: Piece, totals: Sequence[Partial], workplace: Workplace, slab: int = SLAB) -> Partial:
    """Gather the round after `totals` from one piece of a cut tensor; empty where no round is left.

    Where the base may be kept, the last round is the merge itself, for how far it drifts.
    """
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    gather, statistics = expression.advance(totals)
    last = piece.tensor.most_growth is not None and len(totals) == expression.rounds()
    if gather is None and not last:
        return ()
    part = _alone(piece)
    staging = find_device_staging(piece, workplace, slab)
    need_bytes = max(gather_bytes(part, workplace.share_bytes), staging.host_bytes if staging else 0)
    with workplace.lend(need_bytes) as arena, open_work(piece, arena, workplace, staging) as work:
        slab = staging.slab if staging else slab
        if gather is None:
            found = _gather_drift(piece, statistics, work, workplace, slab)
        else:
            found = _gather(piece, gather, work, workplace, slab)
    workplace.count(Counts(work.read_bytes))  # no receipt tells of it
    return found


def gather_squares(part: Part, count: int, workplace: Workplace, slab: int = SLAB) -> Partial:
    """Gather the part's share of the squared norms of the merge's `count` task vectors."""
    total: Partial = tuple(ExactSum() for _ in range(count))
    pieces = [piece for piece in part.pieces if isinstance(piece.tensor.expression, Merged)]
    with workplace.lend(gather_bytes(part, workplace.share_bytes)) as arena, _open(arena, workplace) as work:
        for piece in pieces:
            for span in _iter_slabs(piece, work, workplace, slab):
                expression = piece.tensor.expression
                assert isinstance(expression, Merged)
                total = add_partials(total, expression.gather_squares(count, span, work))
    return total


def find_factors(scaling: Scaling, squares: Partial) -> Sequence[float]:
    """Return the factors of all task vectors from the total of what `gather_squares` gathered."""
    return scaling.find_factors([float(square) for square in squares])


def with_factors(piece: Piece, factors: Sequence[float] | None) -> Piece:
    """Return the piece with the factors that followed from the norms of all task vectors."""
    expression = piece.tensor.expression
    if factors is None or not isinstance(expression, Merged):
        return piece
    return _with_expression(piece, expression.with_factors(factors))


def _find_statistics(piece: Piece, totals: Totals, work: Workspace, workplace: Workplace, slab: int) -> Any:
    """Return what the method must know of the whole tensor; gathers it here where the tensor is not cut."""
    expression = piece.tensor.expression
    if not isinstance(expression, Merged):
        return None
    if work.keeps:
        expression.hold(work)

    def gather(asked: Gather) -> Partial:
        assert piece.whole, "a cut tensor's rounds are gathered by tasks of their own"
        return _gather(piece, asked, work, workplace, slab)

    return expression.find_statistics(totals.get(piece.tensor.name, ()), gather)


def _gather(piece: Piece, gather: Gather, work: Workspace, workplace: Workplace, slab: int) -> Partial:
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    total: Partial = ()
    here = work.lanes is None
    slab = slab * STORED_SLABS if here and expression.gathers_stored(gather) else slab
    whole = here and work.keeps and expression.takes_whole(gather)
    for span in _iter_slabs(piece, work, workplace, piece.span.size if whole else slab):
        total = expression.gather(gather, span, work, total)
    return total


def _gather_drift(piece: Piece, statistics: Any, work: Workspace, workplace: Workplace, slab: int) -> Partial:
    watch = _make_watch(piece)
    assert watch is not None, "only merged tensors are guarded"
    fusion = _fuse(piece, statistics) if work.lanes is None else None
    for span in _iter_slabs(piece, work, workplace, slab * STORED_SLABS if fusion else slab):
        if work.lanes is not None:
            combine_there(piece, span, statistics, work, watch)
            continue
        _make_bytes(piece, span, statistics, fusion, work, watch)
    return watch.partial()


def _find_drift(
    piece: Piece, statistics: Any, totals: Totals, work: Workspace, workplace: Workplace, slab: int
) -> Drift:
    """Return how far the whole tensor drifts; merges it once for that where it is not cut."""
    if piece.whole:
        return make_drift(_gather_drift(piece, statistics, work, workplace, slab))
    return make_drift(totals[piece.tensor.name][-1])


def _make_watch(piece: Piece) -> Watch | None:
    expression = piece.tensor.expression
    if not isinstance(expression, Merged):
        return Watch(expression.block, deltas=False) if is_cast(piece.tensor) else None
    return Watch(expression.block, deltas=expression.has_base and expression.kernel.takes_deltas)


def _with_base(piece: Piece) -> Piece:
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    return _with_expression(piece, expression.inputs[0])


def _with_expression(piece: Piece, expression: Expression) -> Piece:
    return replace(piece, tensor=replace(piece.tensor, expression=expression))


def _iter_slabs(
    piece: Piece, work: Workspace, workplace: Workplace, slab: int, block: int | None = None
) -> Iterator[Span]:
    expression, asked = piece.tensor.expression, piece.span.start
    spans = list(iter_slabs(piece.span, slab, block or expression.block))
    beside_bytes = slab_bytes(piece) if work.lanes is None else work.lanes.staging.host_bytes
    for span in fetch_ahead(expression, spans, work, beside_bytes):
        workplace.check_going()
        work.next_slab()
        if span.start >= asked:
            asked = min(max(span.start + AHEAD, span.stop), piece.span.stop)
            _read_ahead(expression, Span(span.start, asked))
        yield span


def _read_ahead(expression: Expression, span: Span) -> None:
    for read in expression.reads(span):
        read_ahead(read.pin, read.offset_bytes, read.size_bytes)


def _fuse(piece: Piece, statistics: Any) -> Fusion | None:
    expression = piece.tensor.expression
    return expression.fuse(statistics, piece.tensor.dtype) if isinstance(expression, Merged) else None


def _make_bytes(
    piece: Piece, span: Span, statistics: Any, fusion: Fusion | None, work: Workspace, watch: Watch | None
) -> Arena:
    """Return the slab's output bytes; `watch` sees a merged or cast slab on its way."""
    expression, dtype = piece.tensor.expression, piece.tensor.dtype
    if isinstance(expression, Stored) and expression.dtype == dtype:
        return expression.read_array(span, work)
    if isinstance(expression, Held | Agreed) and expression.dtype == dtype:
        return _bytes(expression.read(span, work))
    if not isinstance(expression, Merged):
        cast = expression.evaluate(span, work, dtype)
        if watch is not None:
            watch.check(cast)
        return _bytes(cast)
    if fusion is not None:
        return expression.merge_stored(fusion, span, work, dtype, watch)
    merged = expression.combine(statistics, span, work, watch)
    if dtype != expression.dtype:
        merged = work.take((span.size,), dtype).copy_(merged)
    if watch is not None:
        watch.check(merged)
    return _bytes(merged)


def _bytes(tensor: Tensor) -> Arena:
    array: Arena = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array


@contextmanager
def _open(arena: Arena, workplace: Workplace) -> Iterator[Workspace]:
    """Open a workspace for statistics; what is read in it is counted, since no receipt tells of it."""
    with Workspace(arena, storage=workplace.storage, cache=workplace.cache) as work:
        yield work
    workplace.count(Counts(work.read_bytes))


def _alone(piece: Piece) -> Part:
    return Part(0, 0, 0, 0, (piece,))

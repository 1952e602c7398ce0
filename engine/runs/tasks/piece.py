"""One piece of an output tensor: its rounds, its merge, and how far it drifts from its base, slab by slab.

Elements of a slab are read, decoded, merged, encoded, and given on to be written while they lie in the core's cache.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

from mergemill.engine.plan.memory import gather_bytes
from mergemill.engine.plan.steps import Scaling
from mergemill.engine.plan.values import Part, Piece
from mergemill.engine.runs.tasks.guard import Row, to_row
from mergemill.engine.runs.tasks.rounds import Settled, gather_round, hold_inputs, iter_pass, settle
from mergemill.engine.runs.worker.aboard import find_device_staging, merge_there, open_work
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.rounds import Round, find_round, finish_rounds
from mergemill.engine.tensors.slabs import SLAB, Span
from mergemill.engine.tensors.workspace import Arena, Workspace

Totals = Mapping[str, Sequence[Partial]]  # of cut tensors: what their rounds gathered, by output tensor


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

    def gather(asked: Round) -> Partial:
        assert piece.whole, "a cut tensor's rounds are gathered by tasks of their own"
        return gather_round(asked, piece, work, workplace, there)

    tensor, there = piece.tensor, slab if work.lanes is None else work.lanes.staging.slab
    hold_inputs(piece, work)
    settled = finish_rounds(settle(tensor), totals.get(tensor.name, ()), gather)
    ready = settled.ready
    if settled.kept_base:
        work.leave_device()
    watch = ready.make_watch(tensor.dtype) if drifts is not None and settled.drift is None else None
    if work.lanes is not None:
        spans = iter_pass(piece, settled.reading, work, workplace, there)
        yield from merge_there(ready, tensor.dtype, spans, work, watch)
    else:
        for span in iter_pass(piece, settled.reading, work, workplace, slab * ready.step(tensor.dtype)):
            yield span, ready.encode(span, work, tensor.dtype, watch)
    if drifts is not None:
        drifts.extend(_find_rows(piece, settled, watch))


def _find_rows(piece: Piece, settled: Settled, watch: Watch | None) -> list[Row]:
    """Return what the receipt says of the piece; of a whole tensor's drift once, with its first piece."""
    if watch is not None:
        return [to_row(watch.drift(), kept_base=False)]
    if settled.drift is None:
        return []
    return [to_row(settled.drift, kept_base=settled.kept_base) if piece.span.start == 0 else []]


@own_modes()
def gather_piece(piece: Piece, totals: Sequence[Partial], workplace: Workplace, slab: int = SLAB) -> Partial:
    """Gather the round after `totals` from one piece of a cut tensor; empty where no round is left."""
    asked = find_round(settle(piece.tensor), totals)
    if asked is None:
        return ()
    staging = find_device_staging(piece, workplace, slab)
    need_bytes = max(gather_bytes(_alone(piece), workplace.share_bytes), staging.host_bytes if staging else 0)
    with workplace.lend(need_bytes) as arena, open_work(piece, arena, workplace, staging) as work:
        hold_inputs(piece, work)
        found = gather_round(asked, piece, work, workplace, staging.slab if staging else slab)
    workplace.count(Counts(work.read_bytes))  # no receipt tells of it
    return found


def gather_rest(
    pieces: Sequence[Piece], totals: Sequence[Partial], workplace: Workplace, slab: int = SLAB
) -> list[Partial]:
    """Gather all rounds after `totals` from all pieces of a cut tensor, one after the other."""
    found: list[Partial] = []
    while find_round(settle(pieces[0].tensor), [*totals, *found]) is not None:
        total: Partial = ()
        for piece in pieces:
            total = add_partials(total, gather_piece(piece, [*totals, *found], workplace, slab))
        found.append(total)
    return found


@own_modes()
def gather_squares(part: Part, count: int, workplace: Workplace, slab: int = SLAB) -> Partial:
    """Gather the part's share of the squared norms of the merge's `count` task vectors."""
    total: Partial = tuple(ExactSum() for _ in range(count))
    with workplace.lend(gather_bytes(part, workplace.share_bytes)) as arena:
        for piece in part.pieces:
            with Workspace(arena, storage=workplace.storage, cache=workplace.cache) as work:
                hold_inputs(piece, work)
                gather = functools.partial(gather_round, piece=piece, work=work, workplace=workplace, slab=slab)
                total = add_partials(total, finish_rounds(piece.tensor.expression.square_rounds(count), (), gather))
            workplace.count(Counts(work.read_bytes))  # no receipt tells of it
    return total


@own_modes()
def find_factors(scaling: Scaling, squares: Partial) -> Sequence[float]:
    """Return the factors of all task vectors from the total of what `gather_squares` gathered."""
    return scaling.find_factors([float(square) for square in squares])


def with_factors(piece: Piece, factors: Sequence[float] | None) -> Piece:
    """Return the piece with the factors that followed from the norms of all task vectors."""
    if factors is None:
        return piece
    return piece._replace(tensor=piece.tensor._replace(expression=piece.tensor.expression.with_factors(factors)))


def _alone(piece: Piece) -> Part:
    return Part(0, 0, 0, 0, (piece,))

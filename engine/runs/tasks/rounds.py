"""The rounds that an output tensor goes through before its slabs are written, and the one loop that drives them.

A tensor that is whole in its part has them there. One that is cut over several parts has them before: each piece
gathers its share, the shares are added up, and every piece's task is given the totals.
"""

import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from mergemill.engine.plan.values import OutputTensor, Part, Piece, Plan
from mergemill.engine.runs.tasks.guard import find_fault
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import read_ahead
from mergemill.engine.tensors.ahead import fetch_ahead
from mergemill.engine.tensors.drift import Drift, make_drift
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.rounds import Ready, Round
from mergemill.engine.tensors.slabs import SLAB, Span, iter_slabs
from mergemill.engine.tensors.workspace import Workspace

AHEAD = 32 * SLAB  # elements of each input that the kernel is asked to read ahead


@dataclass(frozen=True, slots=True)
class Settled:
    """An output tensor of which all is known: what is written of it."""

    ready: Ready
    reading: Expression  # what its slabs read
    drift: Drift | None  # of the whole tensor from its base, where that decides
    kept_base: bool  # whether the base is written instead of the merge


def settle(tensor: OutputTensor) -> Generator[Round, Partial, Settled]:
    """Yield the rounds of a tensor; the last is the merge itself, where the base may be kept, for how far it drifts."""
    expression = tensor.expression
    ready = yield from expression.rounds()
    if tensor.most_growth is None:
        return Settled(ready, expression, None, kept_base=False)
    drift = make_drift((yield Round(functools.partial(_gather_drift, ready, tensor.dtype), ready.step(tensor.dtype))))
    if not find_fault(drift, tensor.most_growth):
        return Settled(ready, expression, drift, kept_base=False)
    return Settled(ready.base, expression.inputs[0], drift, kept_base=True)


def _gather_drift(ready: Ready, dtype: str, span: Span, work: Workspace, total: Partial) -> Partial:
    watch = ready.make_watch(dtype)
    assert watch is not None, "only merged tensors are guarded"
    if work.lanes is None:
        ready.encode(span, work, dtype, watch)
    else:
        ready.slab(span, work, dtype, watch)
    return add_partials(total, watch.partial())


def gather_round(asked: Round, piece: Piece, work: Workspace, workplace: Workplace, slab: int) -> Partial:
    """Return what one round gathers from a piece."""
    here, reading = work.lanes is None, piece.tensor.expression
    step = slab * asked.slabs if here else slab
    whole = here and work.keeps and asked.whole
    total: Partial = ()
    for span in iter_pass(piece, reading, work, workplace, piece.span.size if whole else step):
        total = asked.take(span, work, total)
    return total


def iter_pass(piece: Piece, reading: Expression, work: Workspace, workplace: Workplace, slab: int) -> Iterator[Span]:
    """Yield the slabs of one pass over a piece, while what `reading` reads for those to come is on its way."""
    expression, asked = piece.tensor.expression, piece.span.start
    spans = list(iter_slabs(piece.span, slab, expression.block))
    beside_bytes = piece.projected.slab_bytes if work.lanes is None else work.lanes.staging.host_bytes
    for span in fetch_ahead(reading, spans, work, beside_bytes):
        workplace.check_going()
        work.next_slab()
        if span.start >= asked:
            asked = min(max(span.start + AHEAD, span.stop), piece.span.stop)
            _read_ahead(reading, Span(span.start, asked))
        yield span


def _read_ahead(expression: Expression, span: Span) -> None:
    for read in expression.reads_ahead(span):
        read_ahead(read.pin, read.offset_bytes, read.size_bytes)


def hold_inputs(piece: Piece, work: Workspace) -> None:
    """Have what every slab needs whole in one piece of memory; in a workspace that keeps what it reads, all inputs."""
    expression = piece.tensor.expression
    for read in (*expression.holds(piece.span), *(expression.reads(piece.span) if work.keeps else ())):
        work.hold(read.pin, read.offset_bytes, read.size_bytes)


def iter_cut_tensors(plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the tensors of which `parts` hold pieces and whose rounds need all pieces of the plan."""
    wanted = {piece.tensor.name for part in parts for piece in cut_pieces(part)}
    pieces: dict[str, list[Piece]] = {}
    for part in plan.parts:
        for piece in cut_pieces(part):
            if piece.tensor.name in wanted:
                pieces.setdefault(piece.tensor.name, []).append(piece)
    yield from pieces.items()


def cut_pieces(part: Part) -> list[Piece]:
    """Return the pieces of a part that need such rounds."""
    return [piece for piece in part.pieces if not piece.whole and piece.projected.most_rounds]

"""What runs on a worker: one part from its sources to its range of the output, slab by slab.

Elements of a slab are read, decoded, merged, encoded, checksummed and written while they lie in the core's cache.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergemill.engine.plan.memory import keep_bytes, needs_passes, stream_bytes, task_bytes
from mergemill.engine.plan.values import Part, Piece
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.positioned import open_positioned
from mergemill.engine.storage.ranges import check_pin, read_ahead
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Agreed, Expression, Held, Merged, Stored
from mergemill.engine.tensors.kernels import Gather, Partial, add_partials
from mergemill.engine.tensors.slabs import SLAB, Span, iter_slabs
from mergemill.engine.tensors.workspace import Workspace

Totals = Mapping[str, Sequence[Partial]]  # of cut tensors: what their rounds gathered, by output tensor
Sink = Callable[[int, memoryview], None]  # given where in the shard, and the bytes

AHEAD = 32 * SLAB  # elements of each input that the kernel is asked to read ahead


def run_part(part: Part, shard: str, path: Path, totals: Totals, workplace: Workplace, slab: int = SLAB) -> Receipt:
    """Merge one part and write it into the file at `path`; returns its receipt."""
    with open_positioned(path) as writer:
        receipt = merge_part(part, shard, writer.write, totals, workplace, slab)
        writer.start_writeback(part.start_bytes, part.size_bytes)
    return receipt


def merge_part(part: Part, shard: str, sink: Sink, totals: Totals, workplace: Workplace, slab: int = SLAB) -> Receipt:
    """Merge one part, give its bytes to `sink` in order, and return the receipt."""
    need_bytes = task_bytes(part, workplace.share_bytes)
    checksum = xxhash.xxh3_128()
    read_bytes = 0
    with workplace.lend(need_bytes) as arena:
        started = time.perf_counter()
        for piece in part.pieces:
            keep = piece.whole and needs_passes(piece) and keep_bytes(piece) <= need_bytes
            work = Workspace(arena, keep=keep)
            for span, merged in merge_piece(piece, totals, work, workplace, slab):
                data = merged.numpy().data
                checksum.update(data)
                sink(piece.offset_bytes + (span.start - piece.span.start) * item_bytes(piece.tensor.dtype), data)
            read_bytes += work.read_bytes
        _check_sources(part)
        seconds = time.perf_counter() - started
    return Receipt(
        part.number, shard, part.start_bytes, part.stop_bytes, checksum.hexdigest(), read_bytes, round(seconds, 6)
    )


def merge_piece(
    piece: Piece, totals: Totals, work: Workspace, workplace: Workplace, slab: int = SLAB
) -> Iterator[tuple[Span, Tensor]]:
    """Yield the piece's slabs, each with its output bytes, flat uint8, which are gone with the next."""
    statistics = _find_statistics(piece, totals, work, workplace, slab)
    for span in _iter_slabs(piece, work, workplace, slab):
        yield span, _make_bytes(piece, span, statistics, work)


def gather_piece(piece: Piece, totals: Sequence[Partial], workplace: Workplace, slab: int = SLAB) -> Partial:
    """Gather the round after `totals` from one piece of a cut tensor; empty where no round is left."""
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    gather, _ = expression.advance(totals)
    if gather is None:
        return ()
    with workplace.lend(stream_bytes(_alone(piece))) as arena:
        return _gather(piece, gather, Workspace(arena), workplace, slab)


def check_part(part: Part, path: Path, receipt: Receipt, workplace: Workplace) -> bool:
    """Whether the part's range of the file at `path` is what its receipt says."""
    return receipt.checksum == checksum_range(path, part.start_bytes, part.stop_bytes, workplace)


def checksum_range(path: Path, start_bytes: int, stop_bytes: int, workplace: Workplace) -> str:
    """Return the xxh3_128 of a range of a file."""
    checksum = xxhash.xxh3_128()
    buffer_bytes = min(1 << 20, workplace.share_bytes)
    with workplace.lend(buffer_bytes) as arena, open(path, "rb", buffering=0) as file:
        buffer = arena.numpy().data[:buffer_bytes]
        file.seek(start_bytes)
        left = stop_bytes - start_bytes
        while left > 0:
            got = file.readinto(buffer[: min(left, buffer_bytes)])
            if not got:
                break
            checksum.update(buffer[:got])
            left -= got
    return checksum.hexdigest()


def _check_sources(part: Part) -> None:
    """No receipt for what was read from a file that changed meanwhile; descriptors are compared when opened only."""
    for pin in {read.pin for piece in part.pieces for read in piece.tensor.expression.reads(piece.span)}:
        check_pin(pin)


def _find_statistics(piece: Piece, totals: Totals, work: Workspace, workplace: Workplace, slab: int) -> Any:
    """Return what the method must know of the whole tensor; gathers it here where the tensor is not cut."""
    expression = piece.tensor.expression
    if not isinstance(expression, Merged):
        return None
    known = list(totals.get(piece.tensor.name, ()))
    gather, statistics = expression.advance(known)
    while gather is not None:
        assert piece.whole, "a cut tensor's rounds are gathered by tasks of their own"
        known.append(_gather(piece, gather, work, workplace, slab))
        gather, statistics = expression.advance(known)
    return statistics


def _gather(piece: Piece, gather: Gather, work: Workspace, workplace: Workplace, slab: int) -> Partial:
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    total: Partial = ()
    for span in _iter_slabs(piece, work, workplace, slab):
        total = add_partials(total, expression.gather(gather, span, work))
    return total


def _iter_slabs(piece: Piece, work: Workspace, workplace: Workplace, slab: int) -> Iterator[Span]:
    expression, asked = piece.tensor.expression, piece.span.start
    for span in iter_slabs(piece.span, slab, expression.block):
        workplace.check_going()
        work.next_slab()
        if span.start >= asked:
            asked = min(max(span.start + AHEAD, span.stop), piece.span.stop)
            _read_ahead(expression, Span(span.start, asked))
        yield span


def _read_ahead(expression: Expression, span: Span) -> None:
    for read in expression.reads(span):
        read_ahead(read.pin, read.offset_bytes, read.size_bytes)


def _make_bytes(piece: Piece, span: Span, statistics: Any, work: Workspace) -> Tensor:
    """Return the slab's output bytes, flat uint8."""
    expression, dtype = piece.tensor.expression, piece.tensor.dtype
    if isinstance(expression, Stored | Held | Agreed) and expression.dtype == dtype:
        return expression.read(span, work)
    if not isinstance(expression, Merged):
        return _bytes(expression.evaluate(span, work, dtype))
    merged = expression.combine(statistics, span, work)
    if dtype == expression.dtype:
        return _bytes(merged)
    return _bytes(work.take((span.size,), dtype).copy_(merged))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _alone(piece: Piece) -> Part:
    return Part(0, 0, 0, 0, (piece,))

"""What runs on a worker: one part from its sources to its range of the output, or all parts of a shard in order."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import xxhash

from mergemill.engine.plan.memory import task_bytes
from mergemill.engine.plan.values import Part, Piece
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.outputs.target import PartTarget, ShardTarget
from mergemill.engine.runs.tasks.guard import Row
from mergemill.engine.runs.tasks.piece import Totals, merge_piece
from mergemill.engine.runs.tasks.together import iter_groups, merge_together
from mergemill.engine.runs.worker.aboard import find_device_staging, open_work
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage.ranges import Pin, check_pin
from mergemill.engine.tensors.device import Staging
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.slabs import SLAB
from mergemill.engine.tensors.workspace import Arena, Results, Workspace, aligned

Sink = Callable[[int, memoryview], None]  # given where in the shard, and the bytes


@own_modes()
def run_part(
    part: Part, shard: str, target: PartTarget, totals: Totals, workplace: Workplace, slab: int = SLAB
) -> Receipt:
    """Merge one part and write it where `target` says, or have it copied there; returns its receipt."""
    if (copied := target.copy_part(part, shard, workplace)) is not None:
        return _count(copied, workplace)
    beside_bytes = aligned(target.beside_bytes)
    need_bytes = _find_need(part, workplace, workplace.share_bytes - beside_bytes, slab)
    with (
        workplace.lend(beside_bytes + need_bytes) as arena,
        target.open_part(part, arena[:beside_bytes]) as writer,
    ):
        room = arena[beside_bytes:]
        receipt = _merge_part(part, shard, writer.write, totals, workplace, slab, room, need_bytes)
        return _count(replace(receipt, uploads=writer.finish()), workplace)


@own_modes()
def run_shard(
    parts: Sequence[Part], shard: str, target: ShardTarget, totals: Totals, workplace: Workplace, slab: int = SLAB
) -> list[Receipt]:
    """Merge all parts of a shard and write it, front to back, where `target` says; returns their receipts."""
    need_bytes = max(_find_need(part, workplace, workplace.share_bytes - target.beside_bytes, slab) for part in parts)
    with target.open_shard() as writer:
        with workplace.lend(need_bytes, target.beside_bytes) as arena:
            receipts = [
                _merge_part(part, shard, lambda _, data: writer.write(data), totals, workplace, slab, arena, need_bytes)
                for part in parts
            ]
            writer.finish()
        uploads = writer.deliver(workplace.check_going)
    return [_count(replace(receipt, uploads=uploads), workplace) for receipt in receipts]


@own_modes()
def merge_part(part: Part, shard: str, sink: Sink, totals: Totals, workplace: Workplace, slab: int = SLAB) -> Receipt:
    """Merge one part, give its bytes to `sink` in order, and return the receipt."""
    need_bytes = _find_need(part, workplace, workplace.share_bytes, slab)
    with workplace.lend(need_bytes) as arena:
        return _merge_part(part, shard, sink, totals, workplace, slab, arena, need_bytes)


def _find_need(part: Part, workplace: Workplace, share_bytes: int, slab: int) -> int:
    """Return what the part's task asks the memory gate for."""
    stagings = [(piece, find_device_staging(piece, workplace, slab)) for piece in part.pieces]
    there = [_keeping_bytes(piece, staging) for piece, staging in stagings if staging and piece.whole]
    least_bytes = max((staging.host_bytes for _, staging in stagings if staging), default=0)
    kept = (size_bytes for size_bytes in there if size_bytes <= share_bytes)
    return max([task_bytes(part, share_bytes), least_bytes, *kept])


def _keeping_bytes(piece: Piece, staging: Staging | None) -> int:
    """Return what the piece takes when its inputs are kept for later passes."""
    kept_bytes = piece.projected.keep_bytes
    if staging is None or not piece.projected.most_rounds:
        return kept_bytes
    return max(kept_bytes, kept_bytes - piece.projected.slab_bytes + staging.host_bytes)


def _merge_part(
    part: Part,
    shard: str,
    sink: Sink,
    totals: Totals,
    workplace: Workplace,
    slab: int,
    arena: Arena,
    need_bytes: int,
) -> Receipt:
    checksum = xxhash.xxh3_128()
    read_bytes = 0
    started = time.perf_counter()
    drifts: list[Row] = []
    results = Results()
    pins: set[Pin] = set()
    for group in iter_groups(part.pieces, need_bytes, slab, alone=workplace.device is not None):
        if len(group) > 1:
            with Workspace(arena, keep=True, storage=workplace.storage, cache=workplace.cache, results=results) as work:
                for offset_bytes, together in merge_together(group, work, workplace, drifts):
                    checksum.update(together.data)
                    sink(offset_bytes, together.data)
        else:
            (piece,) = group
            staging = find_device_staging(piece, workplace, slab)
            keep = piece.whole and piece.projected.most_rounds > 0 and _keeping_bytes(piece, staging) <= need_bytes
            with open_work(piece, arena, workplace, staging, keep=keep, results=results) as work:
                for span, merged in merge_piece(piece, totals, work, workplace, slab, drifts):
                    data = merged.data
                    checksum.update(data)
                    sink(piece.offset_bytes + (span.start - piece.span.start) * item_bytes(piece.tensor.dtype), data)
        read_bytes += work.read_bytes
        pins |= work.pins
    for pin in pins:  # no receipt for what was read from a file that changed meanwhile
        check_pin(pin, workplace.storage)  # descriptors are compared when opened only
    seconds = time.perf_counter() - started
    return Receipt(
        part.number,
        shard,
        part.start_bytes,
        part.stop_bytes,
        checksum.hexdigest(),
        read_bytes,
        round(seconds, 6),
        drifts,
    )


def _count(receipt: Receipt, workplace: Workplace) -> Receipt:
    """Count a finished part."""
    workplace.count(Counts(receipt.read_bytes, receipt.stop_bytes - receipt.start_bytes, parts=1))
    return receipt

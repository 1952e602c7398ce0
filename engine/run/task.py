"""What runs on a worker: one part from its sources to its range of the output."""

import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from mergemill.engine.plan.memory import keep_bytes, needs_passes, task_bytes
from mergemill.engine.plan.values import Part
from mergemill.engine.run.guard import Row
from mergemill.engine.run.piece import Totals, merge_piece
from mergemill.engine.run.receipts import Receipt
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.positioned import open_positioned
from mergemill.engine.storage.ranges import check_pin
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.slabs import SLAB
from mergemill.engine.tensors.workspace import Workspace

Sink = Callable[[int, memoryview], None]  # given where in the shard, and the bytes


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
        drifts: list[Row] = []
        for piece in part.pieces:
            keep = piece.whole and needs_passes(piece) and keep_bytes(piece) <= need_bytes
            with Workspace(arena, keep=keep) as work:
                for span, merged in merge_piece(piece, totals, work, workplace, slab, drifts):
                    data = merged.data
                    checksum.update(data)
                    sink(piece.offset_bytes + (span.start - piece.span.start) * item_bytes(piece.tensor.dtype), data)
            read_bytes += work.read_bytes
        _check_sources(part)
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


def check_part(part: Part, path: Path, receipt: Receipt, workplace: Workplace) -> bool:
    """Whether the part's range of the file at `path` is what its receipt says."""
    return receipt.checksum == checksum_range(path, part.start_bytes, part.stop_bytes, workplace)


def checksum_range(path: Path, start_bytes: int, stop_bytes: int, workplace: Workplace) -> str:
    """Return the xxh3_128 of a range of a file."""
    checksum = xxhash.xxh3_128()
    buffer_bytes = min(1 << 20, workplace.share_bytes)
    with workplace.lend(buffer_bytes) as arena, open(path, "rb", buffering=0) as file:
        buffer = arena.data[:buffer_bytes]
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

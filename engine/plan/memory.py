"""Projected memory: what a part will take of a worker, known before it runs.

A part streams: slab after slab, its inputs' bytes, their float32 copies, what the kernel allocates beside them, and
the encoded output. Where a method needs statistics and the inputs of a whole tensor fit as well, they are kept, so
that its passes read them once.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import attrgetter

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.sizes import format_size, say_enough
from mergemill.engine.plan.values import OutputTensor, Part, Piece, Projected
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.tensors.ahead import SLOTS, group_slabs, slot_bytes
from mergemill.engine.tensors.device import CPU_MADE, Staging
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import SLAB, STORED_SLABS, Span, iter_slabs, slab_step
from mergemill.engine.tensors.workspace import aligned

DEVICE_FACTORS = (16, 4, 1)  # on slabs: a device wants much at once, or starting its kernels is most of the time


TOGETHER_BYTES = 4 << 20  # of small tensors that are merged in one go, as they are stored and as they are written


Known = dict[Hashable, list[tuple[Span, Projected]]]  # how tensors that are alike are cut, and what each cut takes


def find_likeness(tensor: OutputTensor) -> Hashable:
    """Return what is equal for tensors that are cut alike and take the same; None where nothing says so."""
    likeness = tensor.expression.find_likeness()
    return None if likeness is None else (likeness, tensor.dtype, tensor.most_growth is None)


def make_piece(
    tensor: OutputTensor,
    span: Span,
    offset_bytes: int,
    projected: Projected | None = None,
    *,
    whole: bool,
    remote: bool | None = None,
) -> Piece:
    """Return a piece of a tensor with what merging it takes.

    projected: what a piece alike takes, without what may come ahead; remote: `reads_remotely`, where that is known.
    """
    projected = project(tensor, span) if projected is None else projected
    remote = reads_remotely(tensor.expression) if remote is None else remote
    ahead_bytes = _ahead_bytes(tensor.expression, span) if remote else 0
    projected = replace(projected, ahead_bytes=ahead_bytes) if ahead_bytes else projected
    return Piece(tensor, span, offset_bytes, whole, projected)


def reads_remotely(expression: Expression) -> bool:
    """Whether an input is not of this machine's files."""
    return any(map(is_remote, {pin.url for pin in expression.iter_pins()}))


def project(tensor: OutputTensor, span: Span) -> Projected:
    """Return what merging a span takes, without what may come ahead."""
    expression, out = tensor.expression, tensor.dtype
    held_bytes = sum(aligned(read.size_bytes) for read in expression.holds(span))
    slab_bytes = expression.step_bytes(span.size, out) + held_bytes
    ends = 64 * math.ceil(span.size / slab_step(SLAB, expression.block))  # what aligning each slab's kept bytes can add
    sizes = Counter(map(attrgetter("size_bytes"), expression.reads(span)))
    kept_bytes = sum(count * (aligned(size_bytes) + ends) for size_bytes, count in sizes.items())
    usual, most = expression.count_rounds()
    guarded = tensor.most_growth is not None
    return Projected(slab_bytes, slab_bytes + kept_bytes, 0, usual + guarded, most + guarded)


def stream_bytes(part: Part) -> int:
    """Return an upper bound of what the part takes when nothing is kept between passes."""
    return max((piece.projected.slab_bytes for piece in part.pieces), default=0)


def task_bytes(part: Part, memory_bytes: int) -> int:
    """Return what the part's task asks the memory gate for: with its inputs kept as far as `memory_bytes` allow."""
    kept = [piece.projected.keep_bytes for piece in part.pieces if piece.whole and piece.projected.most_rounds]
    alone_bytes = max([gather_bytes(part, memory_bytes), *(size for size in kept if size <= memory_bytes)])
    return max(alone_bytes, min(_together_bytes(part), memory_bytes))


def _together_bytes(part: Part) -> int:
    """Return what a part's small tensors take that are merged in one go: see `runs/tasks/together.py`."""
    small = [piece for piece in part.pieces if piece.whole and piece.span.size <= SLAB]
    ends = min(TOGETHER_BYTES, sum(map(end_bytes, small)))
    return max((piece.projected.slab_bytes + ends for piece in small), default=0)


def end_bytes(piece: Piece) -> int:
    """Return what a piece's inputs take, and its output."""
    kept_bytes = piece.projected.keep_bytes - piece.projected.slab_bytes
    return kept_bytes + aligned(piece.span.size * item_bytes(piece.tensor.dtype))


def gather_bytes(part: Part, memory_bytes: int) -> int:
    """Return what a task asks for that goes over the part's inputs once: with room ahead as far as memory allows."""
    wanted = max((piece.projected.slab_bytes + piece.projected.ahead_bytes for piece in part.pieces), default=0)
    return max(stream_bytes(part), min(wanted, memory_bytes))


def check_memory(parts: Sequence[Part], memory_bytes: int, beside_bytes: int = 0) -> None:
    """Raise `PlanError` with the number that would do where a part cannot run in `memory_bytes`.

    beside_bytes: what writing a part takes.
    """
    worst = max(parts, key=stream_bytes, default=None)
    if worst is not None and stream_bytes(worst) + beside_bytes > memory_bytes:
        needed = stream_bytes(worst) + beside_bytes
        tensor = max(worst.pieces, key=lambda piece: piece.projected.slab_bytes).tensor.name
        raise PlanError(
            f"--memory {format_size(memory_bytes)} is too little: tensor {tensor} needs {needed} bytes a worker: "
            f"--memory {say_enough(needed)}"
        )


def find_staging(piece: Piece, device: str, slab: int, host_bytes: int, device_bytes: int) -> Staging | None:
    """Return how the piece goes by way of a device, in slabs as large as both memories allow; None: it does not.

    What must not be less is `slab`: there the staging may take more than `device_bytes`. Where a base may be kept,
    slabs are those of the CPU, which reads the base again in the same ranges.
    """
    expression = piece.tensor.expression
    if device == "cpu" or not expression.is_merged or not piece.span.size:
        return None
    if piece.tensor.dtype in CPU_MADE or not expression.suits_device(device):
        return None
    factors = DEVICE_FACTORS if piece.tensor.most_growth is None else (1,)
    found = [_make_staging(piece, slab * factor) for factor in factors]
    fits = (each for each in found if each.host_bytes <= host_bytes and each.device_bytes <= device_bytes)
    return next(fits, found[-1])


def _make_staging(piece: Piece, slab: int) -> Staging:
    expression, out = piece.tensor.expression, piece.tensor.dtype
    elements = min(slab_step(slab, expression.block), piece.span.size)
    reads = expression.reads(Span(piece.span.start, piece.span.start + elements))
    lane_bytes, beside_bytes = expression.device_bytes(elements, out)
    host_lane_bytes = sum(aligned(read.size_bytes) for read in reads) + aligned(elements * item_bytes(out))
    return Staging(slab, 1 if elements == piece.span.size else 2, host_lane_bytes, lane_bytes, beside_bytes)


def check_device_memory(parts: Sequence[Part], device: str, memory_bytes: int) -> None:
    """Raise `PlanError` with the number that would do where a tensor does not fit the promised device memory."""
    need_bytes, tensor = device_need(parts, device)
    if need_bytes > memory_bytes:
        raise PlanError(
            f"--device-memory {format_size(memory_bytes)} is too little: tensor {tensor} needs {need_bytes} bytes "
            f"on the device: --device-memory {say_enough(need_bytes)}; or leave the merge to the CPU with --device cpu"
        )


def device_need(parts: Sequence[Part], device: str) -> tuple[int, str]:
    """Return the least device memory that does for every tensor merged there, and the name of the one it is for."""
    pieces = [piece for part in parts for piece in part.pieces]
    found = ((find_staging(piece, device, SLAB, 0, 0), piece.tensor.name) for piece in pieces)
    return max(((staging.device_bytes, name) for staging, name in found if staging), default=(0, ""))


def count_device_tensors(parts: Sequence[Part], device: str) -> int:
    """Return how many tensors are merged on the device; what is copied, cast or not for it stays with the CPU."""
    pieces = [piece for part in parts for piece in part.pieces]
    return len({piece.tensor.name for piece in pieces if find_staging(piece, device, SLAB, 0, 0)})


def _ahead_bytes(expression: Expression, span: Span) -> int:
    """What remote ranges of slabs to come may take."""
    step = slab_step(STORED_SLABS * SLAB, expression.block)
    groups = group_slabs(expression, list(iter_slabs(span, step, expression.block)))
    return SLOTS * slot_bytes(expression, groups) if groups else 0

"""Remote ranges of the slabs to come, fetched in pieces of several slabs while the slab at hand is worked on."""

from collections.abc import Iterator, Sequence

from mergemill.engine.storage.fetch import PIECE_BYTES
from mergemill.engine.storage.ranges import Pin, is_remote
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned

SLOTS = 8  # groups of slabs on their way at once, as far as there is memory for them
_FEWEST = 2  # with one there is nothing that comes while another is worked on


def fetch_ahead(expression: Expression, spans: Sequence[Span], work: Workspace, beside_bytes: int) -> Iterator[Span]:
    """Yield `spans`, the slabs of one pass; what `expression` reads of remote files for them is then on its way.

    beside_bytes: what a slab takes of the workspace. Ranges come as far ahead as the rest of it has room.
    """
    groups = group_slabs(expression, spans)
    slots = work.reserve(slot_bytes(expression, groups), SLOTS, beside_bytes) if groups else []
    ahead = len(slots) if len(slots) >= _FEWEST else 0
    for i in range(min(ahead, len(groups))):
        work.fetch(slots[i], remote_ranges(expression, _join(groups[i])))
    for i, group in enumerate(groups):
        yield from group
        if i + ahead < len(groups) and ahead:
            work.drop(slots[i % ahead])
            work.fetch(slots[i % ahead], remote_ranges(expression, _join(groups[i + ahead])))


def group_slabs(expression: Expression, spans: Sequence[Span]) -> list[Sequence[Span]]:
    """Cut the slabs of a pass into runs that read about a piece of every input."""
    sizes = [size for _, _, size in remote_ranges(expression, spans[0])] if spans else []
    each = max(1, PIECE_BYTES // max(sizes)) if any(sizes) else len(spans)
    return [spans[i : i + each] for i in range(0, len(spans), each or 1)]


def slot_bytes(expression: Expression, groups: Sequence[Sequence[Span]]) -> int:
    """Return the room that the largest of the groups needs."""
    return max(sum(aligned(size) for _, _, size in remote_ranges(expression, _join(group))) for group in groups)


def remote_ranges(expression: Expression, span: Span) -> list[tuple[Pin, int, int]]:
    """Return what `expression` reads of remote files for a span, each range once: pin, offset and size in bytes."""
    if not any(is_remote(read.pin.url) for read in expression.reads(Span(0, 0))):
        return []  # without a look at each range, of which rows of another vocabulary have one each
    reads = expression.reads(span)
    return list(
        dict.fromkeys((read.pin, read.offset_bytes, read.size_bytes) for read in reads if is_remote(read.pin.url))
    )


def _join(group: Sequence[Span]) -> Span:
    return Span(group[0].start, group[-1].stop)

"""Spans cover their tensor once, in order, cut at blocks only."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, cut_evenly, iter_slabs

sizes = st.integers(0, 200 * BLOCK) | st.integers(0, 200).map(lambda blocks: blocks * BLOCK)


def check_cover(spans: list[Span], whole: Span) -> None:
    """Check that `spans` are `whole` without holes or overlaps, cut at blocks."""
    assert spans[0].start == whole.start
    assert spans[-1].stop == whole.stop
    for left, right in pairwise(spans):
        assert left.stop == right.start
        assert right.start % BLOCK == 0


@given(sizes, st.integers(1, 250 * BLOCK))
def test_pieces_cover_the_tensor(size: int, most: int) -> None:
    spans = cut_evenly(size, most)
    check_cover(spans, Span(0, size))
    assert size == 0 or all(span.size > 0 for span in spans)


@given(sizes, st.integers(1, 250 * BLOCK))
def test_pieces_are_few_and_hardly_larger_than_asked(size: int, most: int) -> None:
    spans = cut_evenly(size, most)
    step = max(BLOCK, most // BLOCK * BLOCK)
    assert max(span.size for span in spans) <= step, "rounded down to whole blocks"
    assert len(spans) <= max(1, -(-size // step))


@given(sizes, st.integers(1, 250 * BLOCK))
def test_pieces_are_even(size: int, most: int) -> None:
    *others, last = cut_evenly(size, most)
    assert len({span.size for span in others}) <= 1
    assert all(last.size <= span.size for span in others)


def test_nothing_is_one_empty_piece() -> None:
    assert cut_evenly(0, BLOCK) == [Span(0, 0)]
    assert list(iter_slabs(Span(0, 0))) == []


@given(st.integers(0, 20), st.integers(1, 40 * BLOCK), st.integers(1, 8))
def test_slabs_cover_their_span(first: int, size: int, blocks: int) -> None:
    span = Span(first * BLOCK, first * BLOCK + size)
    slabs = list(iter_slabs(span, blocks * BLOCK))
    check_cover(slabs, span)
    assert all(slab.size == blocks * BLOCK for slab in slabs[:-1])
    assert 0 < slabs[-1].size <= blocks * BLOCK


def test_a_slab_is_whole_blocks() -> None:
    assert SLAB % BLOCK == 0

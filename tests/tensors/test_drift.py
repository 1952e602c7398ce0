"""What is watched of a merged tensor: the same for any cut, exact in its counts, a sample in its distances."""

import json
import math
import random
from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from mergemill.engine.runs.tasks.guard import find_fault, find_growth, to_row
from mergemill.engine.tensors.drift import SAMPLE, Drift, Watch, make_drift
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, is_mergeable
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, cut_evenly, iter_slabs, row_block

FLOATS = [name for name in TORCH_DTYPES if is_mergeable(name)]


def make_tensors(size: int, count: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return flat tensors, of very different magnitudes from element to element: base, inputs, merged."""
    stream = np.random.default_rng([seed, size])
    values = stream.standard_normal((count, size)) * 2.0 ** stream.integers(-20, 20, (count, size))
    return [torch.from_numpy(row).to(dtype) for row in values]


def watch_piece(
    tensors: Sequence[Tensor],
    *,
    span: Span | None = None,
    slab: int = SLAB,
    block: int = BLOCK,
    deltas: bool = False,
    based: bool = True,
) -> Partial:
    """Watch one piece; `tensors` are the base, the inputs (or deltas) and what was made of them."""
    watch = Watch(block, deltas=deltas)
    for at in iter_slabs(span or Span(0, len(tensors[0])), slab, block):
        base, *inputs, merged = [tensor[at.start : at.stop].clone() for tensor in tensors]
        watch.look(inputs if based else [base, *inputs], base if based else None)
        for tensor in (base, *inputs):
            tensor.fill_(math.nan)  # the kernel overwrites its inputs
        watch.compare(merged)
        watch.check(merged)
    return watch.partial()


def watch_in_pieces(tensors: Sequence[Tensor], *, pieces: int, block: int = BLOCK, slab: int = SLAB) -> Partial:
    """Watch a tensor that is cut over parts, whose partial results come in any order."""
    size = len(tensors[0])
    spans = cut_evenly(size, -(-size // pieces), block)
    assert len(spans) > 1
    random.Random(size).shuffle(spans)
    partials = [watch_piece(tensors, span=span, slab=slab, block=block) for span in spans]
    return reduce(add_partials, partials, ())


def find_sample(size: int, block: int = BLOCK) -> list[int]:
    """Return the elements that are sampled, from the definition: the first of each block, cut at each `BLOCK`."""
    return [i for i in range(size) if i % block % BLOCK < SAMPLE]


# ------------------------------------------------------------------------------------------------------- sums
@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, BLOCK),
        (1, 1),
        (100, BLOCK),
        (SAMPLE + 1, BLOCK),
        (BLOCK, BLOCK),
        (5 * BLOCK + 17, BLOCK),
        (7 * BLOCK + SAMPLE + 3, BLOCK),
        (900 * 300, row_block((900, 300))),
        (5 * 100_000, row_block((5, 100_000))),
        (4 * BLOCK, 4 * BLOCK),
        (3 * BLOCK + 11, 3 * BLOCK + 11),
    ],
)
def test_distances_are_those_of_the_sample(size: int, block: int) -> None:
    tensors = make_tensors(size)
    drift = make_drift(watch_piece(tensors, block=block))
    at = find_sample(size, block)
    wide = [tensor.double().numpy()[at] for tensor in tensors]
    assert drift.broken == 0
    assert drift.base == pytest.approx(np.sum(wide[0] ** 2), rel=1e-12)
    assert drift.moved == pytest.approx(np.sum((wide[3] - wide[0]) ** 2), rel=1e-12)
    assert drift.inputs == pytest.approx([np.sum((wide[i] - wide[0]) ** 2) for i in (1, 2)], rel=1e-12)


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (5 * BLOCK + 17, BLOCK),
        (16 * BLOCK, BLOCK),
        (9 * BLOCK + SAMPLE - 1, BLOCK),
        (900 * 300, row_block((900, 300))),
        (20_000 * 7, row_block((20_000, 7))),
        (5 * 100_000, row_block((5, 100_000))),
        (30 * 40_000, row_block((30, 40_000))),
    ],
)
def test_sums_are_the_same_for_any_slabs_and_pieces(size: int, block: int) -> None:
    tensors = make_tensors(size)
    whole = watch_piece(tensors, block=block)
    for slab in (BLOCK, 2 * BLOCK, 3 * BLOCK, 1 << 30):
        assert watch_piece(tensors, block=block, slab=slab) == whole, slab
    for pieces in (2, 3):
        assert watch_in_pieces(tensors, pieces=pieces, block=block) == whole, pieces
        assert watch_in_pieces(tensors, pieces=pieces, block=block, slab=BLOCK) == whole, pieces


def test_one_input_and_many_add_in_the_same_order() -> None:
    """Where the library adds along an axis, its order must not follow how many rows lie beside."""
    tensors = make_tensors(5 * BLOCK + 17, 8)
    many = watch_piece(tensors)
    for i in range(1, 7):
        broken, base, other, moved = watch_piece([tensors[0], tensors[i], tensors[7]])
        assert (broken, base, other, moved) == (many[0], many[1], many[1 + i], many[-1])
    alone = watch_piece([tensors[0][:BLOCK], tensors[7][:BLOCK]])
    assert alone[-1] == watch_piece([tensor[:BLOCK] for tensor in tensors])[-1]


def test_deltas_and_models_tell_the_same() -> None:
    base, first, second, merged = make_tensors(2 * BLOCK + 9, dtype=torch.float64)
    models = watch_piece([base, first, second, merged])
    assert watch_piece([base, first - base, second - base, merged], deltas=True) == models


def test_without_a_base_the_first_input_stands_for_it() -> None:
    tensors = make_tensors(2 * BLOCK + 9)
    assert watch_piece(tensors, based=False) == watch_piece(tensors)
    assert watch_piece(tensors, based=False, deltas=True) == watch_piece(tensors)
    alone = make_drift(watch_piece([tensors[0], tensors[3]], based=False))
    assert alone.inputs == ()
    assert alone.moved > 0


def test_sums_are_float64_whatever_the_values() -> None:
    """Squares of float32's extremes, and a small change beside a large value."""
    base, merged = torch.full((SAMPLE,), 1e30), torch.full((SAMPLE,), 3e30)
    assert make_drift(watch_piece([base, base, merged])).moved == pytest.approx(4e60 * SAMPLE, rel=1e-6)
    base = torch.ones(SAMPLE, dtype=torch.float64)
    drift = make_drift(watch_piece([base, base + 1e-12, base + 2e-12]))
    assert math.sqrt(drift.moved / drift.inputs[0]) == pytest.approx(2, rel=1e-3)


def test_of_no_slab_nothing_is_known() -> None:
    assert make_drift(Watch(BLOCK, deltas=False).partial()) == Drift(0, 0.0, 0.0, ())


# ------------------------------------------------------------------------------------------- values not finite
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite_are_counted_wherever_they_are(dtype: str) -> None:
    size, kind = 2 * BLOCK + 100, TORCH_DTYPES[dtype]
    written = torch.zeros(size)
    at = [0, SAMPLE, SAMPLE + 1, BLOCK - 1, BLOCK, 2 * BLOCK + 99]
    values = [math.nan] if dtype == "F8_E4M3" else [math.nan, math.inf, -math.inf]  # e4m3fn has no infinities
    for i, place in enumerate(at):
        written[place] = values[i % len(values)]
    watch = Watch(BLOCK, deltas=False)
    for span in iter_slabs(Span(0, size), BLOCK):
        watch.check(written[span.start : span.stop].to(kind))
    assert watch.partial() == (len(at),)


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_values_whose_sum_overflows_are_no_fault(dtype: str) -> None:
    kind = TORCH_DTYPES[dtype]
    largest = torch.full((BLOCK,), torch.finfo(kind).max, dtype=torch.float64).to(kind)
    watch = Watch(BLOCK, deltas=False)
    watch.check(largest)
    if kind.itemsize > 1:
        watch.check(-largest)
    assert watch.partial() == (0,)


def test_broken_values_of_pieces_add_up() -> None:
    tensors = make_tensors(6 * BLOCK)
    tensors[3][[5, BLOCK, 2 * BLOCK + SAMPLE, 6 * BLOCK - 1]] = math.nan
    drift = make_drift(watch_in_pieces(tensors, pieces=3))
    assert drift.broken == 4
    assert math.isnan(drift.moved)


# ------------------------------------------------------------------------------------------------------ faults
def test_growth_is_the_change_over_the_largest_of_the_inputs() -> None:
    assert find_growth(Drift(0, 36.0, 1e6, (4.0, 9.0))) == 2
    assert find_growth(Drift(0, 36.0, 1e6, ())) == 0


@pytest.mark.parametrize(("moved", "found"), [(100.0 * 1.001, True), (100.0, False), (100.0 * 0.999, False)])
def test_growth_is_a_fault_above_the_ratio_only(moved: float, found: bool) -> None:
    assert bool(find_fault(Drift(0, moved, 50.0, (0.5, 1.0)), 10.0)) == found


def test_rounding_is_no_growth() -> None:
    """Of a base of norm 1: with identical inputs whatever is below 1e-5 counts as rounding."""
    assert not find_fault(Drift(0, 1e-7**2, 1.0, (0.0, 0.0)), 10.0)
    assert not find_fault(Drift(0, 1e-7**2, 1.0, (1e-30, 0.0)), 10.0)
    assert find_fault(Drift(0, 1e-4**2, 1.0, (0.0, 0.0)), 10.0)
    assert not find_fault(Drift(0, 0.0, 0.0, (0.0,)), 10.0)


def test_the_fault_says_what_is_wrong() -> None:
    assert find_fault(Drift(1_234_567, math.nan, 1.0, (1.0,)), 10.0) == "has 1,234,567 values that are not finite"
    fault = "changed 20 times as much as any of its inputs, more than 10 times"
    assert find_fault(Drift(0, 400.0, 1.0, (1.0, 0.5)), 10.0) == fault


@pytest.mark.parametrize(
    ("drift", "growth"),
    [
        (Drift(0, math.inf, 1.0, (1.0,)), math.inf),
        (Drift(3, math.nan, 1.0, (1.0,)), math.inf),
        (Drift(0, 1.0, 1.0, (1.0, math.nan)), 0.0),
        (Drift(0, 1.0, 1.0, (math.inf, 1.0)), 0.0),
        (Drift(0, math.nan, math.nan, (1.0,)), 0.0),
        (Drift(0, math.inf, math.inf, (math.inf,)), 0.0),
    ],
)
def test_inputs_that_are_not_finite_say_nothing_of_growth(drift: Drift, growth: float) -> None:
    assert find_growth(drift) == growth


def test_a_row_is_json_that_any_reader_takes() -> None:
    row = to_row(Drift(1_234_567, math.nan, 2.5, (1 / 3, math.inf)), kept_base=False)
    text = json.dumps(row, allow_nan=False)
    assert json.loads(text) == [0, 1_234_567, 2.5, 1 / 3, None, None]


def test_one_chunk_is_added_in_the_order_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native loops: a sum alone is no reduction of NumPy's, which goes in another order."""
    monkeypatch.setattr("mergemill.engine.tensors.native.load", lambda: None)
    base, *others = make_tensors(2 * BLOCK, seed=3)
    tensors = [base, *others]
    many = watch_piece(tensors, slab=2 * BLOCK)
    assert watch_piece(tensors, slab=BLOCK) == many

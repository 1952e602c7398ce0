"""The loops over what is derived from slabs before it is ranked: the bits of torch."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, make_values
from tensors.made import assert_same_bits, make_slab
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.tensors import native, structures
from mergemill.engine.tensors.digits import Digits
from mergemill.engine.tensors.elementary import exp_, log_, tanh_
from mergemill.engine.tensors.exact import Extremes, find_extremes, sum_rows
from mergemill.engine.tensors.fusion import IMPORTANCE, Fusion, Importances, Join, Scores
from mergemill.engine.tensors.kernels import StoredGather
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native loops are not built here")
SIZE, COLUMNS = 150_001, 1031


def make_deltas(count: int, scale: float) -> list[Tensor]:
    stream = np.random.default_rng(count)
    values = [torch.from_numpy(stream.standard_normal(SIZE).astype(np.float32)) * scale for _ in range(count)]
    for i, value in enumerate(values):
        value[100 * i : 100 * i + 700] = 0
        value[5000 + i :: 997] *= -1e-3
    return values


def make_scores(deltas: Sequence[Tensor], sizes: Sequence[Extremes]) -> list[Tensor]:
    """As the formula has them, operation by operation."""
    total = torch.zeros(SIZE, dtype=torch.float64)
    for delta in deltas:
        total += delta
    made = []
    for delta, size in zip(deltas, sizes, strict=True):
        wide = delta.double()
        relative = (wide.abs() - size.least) / (size.most - size.least)
        within = exp_((relative * relative - 1) * len(deltas))
        made.append((within * tanh_(wide * total)).float())
    return made


@pytest.mark.parametrize("scale", [1e-12, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 3, 70])
def test_scores_and_what_is_seen_of_them_are_those_of_torch(count: int, scale: float) -> None:
    """Also where they are too small for a bound, or the models too many; and none that reaches a window is left out."""
    deltas = make_deltas(count, scale)
    sizes = [find_extremes(delta.abs()) for delta in deltas]
    slab = make_slab([torch.zeros(SIZE), *deltas], (SIZE,), has_base=True)
    assert slab.find_extremes() == tuple(sizes)
    slab = replace(slab, derived=Scores(tuple(e.least for e in sizes), tuple(e.most - e.least for e in sizes)))
    for i, score in list(enumerate(make_scores(deltas, sizes)))[:3]:
        keys = Digits("F32", signed=True).keys(score.clone())
        sample = slab.sample(count + i, 100, 1000, 64)
        assert np.array_equal(sample, keys[np.arange(100, SIZE - 63, 1000)[:, None] + np.arange(64)])
        for low, high in np.sort(keys)[[[500, 2000], [SIZE // 2, SIZE - 9], [SIZE - 9000, SIZE - 8000]]].tolist():
            ends = np.zeros((2, 3), np.int64)
            ((above, inside, near),) = slab.count_windows([(count + i, low, high)], [ends])
            assert above == np.count_nonzero(keys > high)
            assert near is not None
            assert np.array_equal(near.keys, keys[(keys > low) & (keys < high)])
            assert inside == len(near.keys)
            for numbers, key in zip(ends, (low, high), strict=True):
                assert numbers.tolist() == [int(block.sum()) for block in np.split(keys == key, [65536, 131072])]


def test_two_windows_of_the_same_scores_are_looked_at_by_the_lower_one() -> None:
    deltas = make_deltas(2, 0.5)
    sizes = [find_extremes(delta.abs()) for delta in deltas]
    keys = np.sort(Digits("F32", signed=True).keys(make_scores(deltas, sizes)[1]))
    slab = make_slab([torch.zeros(SIZE), *deltas], (SIZE,), has_base=True)
    slab = replace(slab, derived=Scores(tuple(e.least for e in sizes), tuple(e.most - e.least for e in sizes)))
    windows = [(3, int(keys[-20]), int(keys[-1])), (3, int(keys[-9000]), int(keys[-8000]))]
    counted = slab.count_windows(windows, [np.zeros((2, 3), np.int64) for _ in windows])
    found = [(above, inside) for above, inside, _ in counted]
    assert found == [(int((keys > high).sum()), int(((keys > low) & (keys < high)).sum())) for _, low, high in windows]


def make_rows(rows: int = 40) -> tuple[Tensor, Tensor]:
    stream = np.random.default_rng(9)
    before = torch.from_numpy(stream.standard_normal((rows, COLUMNS)).astype(np.float32))
    after = before + 0.1 * torch.from_numpy(stream.standard_normal((rows, COLUMNS)).astype(np.float32))
    before[2] *= 300
    after[3] = before[3]
    after[4, 7] = -torch.inf
    return before, after


def soften(rows: Tensor) -> Tensor:
    wide = rows.double()
    wide = exp_((wide - wide.amax(1, keepdim=True)).view(-1)).view_as(wide)
    return wide / sum_rows(wide.clone())[:, None] + 1e-8


def test_divergences_and_importances_are_those_of_torch() -> None:
    before, after = make_rows()
    slab = make_slab([before, after], tuple(before.shape), block=63 * COLUMNS)
    old, new = soften(before), soften(after)
    expected = sum_rows(log_((new / old).view(-1)).view_as(new) * new).clamp(min=0).numpy()
    found = slab.find_divergences(COLUMNS)
    assert np.array_equal(found, expected)
    assert found[3] == 0
    slab = replace(slab, derived=Importances(found, COLUMNS))
    importance = ((after - before).abs() * torch.from_numpy(found).float()[:, None]).view(-1).numpy()
    upper = np.zeros(1 << 15, np.int64)
    slab.count_upper([IMPORTANCE], [upper])
    assert np.array_equal(upper, np.bincount(importance.view(np.uint32) >> 16, minlength=1 << 15))
    threshold = float(np.quantile(importance, 0.9))
    fusion = Fusion(Join("exceed", (1.0, 1.0), threshold=threshold), derived=slab.derived)
    merged, _ = slab.merge(fusion, "F32", None)
    taken = importance >= np.float32(threshold)
    moved = (before + (after - before)).view(-1).numpy()
    assert np.array_equal(merged.view(np.float32), np.where(taken, moved, before.view(-1).numpy()))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_has_no_divergence_whichever_model_it_is_of(odd: float, tmp_path: Path) -> None:
    """No number times what differs reaches no threshold: the base stays, but where that is none itself."""
    for which in (0, 1):
        rows = list(make_rows())
        rows[which][5, 3] = odd
        slab = make_slab(rows, tuple(rows[0].shape), block=63 * COLUMNS)
        assert np.flatnonzero(np.isnan(slab.find_divergences(COLUMNS))).tolist() == [5]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "load", lambda: None)
            merged = Mill(tmp_path).merge(Task("arcee_fusion", tuple(rows), {}))
        assert torch.equal(merged[5, 4:], rows[0][5, 4:])
        assert_same_bits(Mill(tmp_path).merge(Task("arcee_fusion", tuple(rows), {})), merged)


def test_extremes_of_what_is_no_number_are_none_in_any_order() -> None:
    """As loops find them, and as they are added."""
    values = torch.arange(3000.0) - 7
    values[1500] = torch.nan
    (found,) = make_slab([values], (3000,)).find_extremes()
    whole = Extremes(1.0, 2.0)
    for each in (found, found + whole, whole + found, whole + found + whole):
        assert np.isnan([each.least, each.most]).all()
    (found,) = make_slab([values[:1500]], (1500,)).find_extremes()
    assert found == Extremes(0.0, 1492.0)


@pytest.mark.parametrize("name", ["pcb", "arcee_fusion", "ramplus_tl"])
def test_every_usual_round_is_taken_from_stored_bytes(name: str) -> None:
    """So none of a tensor's passes is decoded to memory."""
    method, (base, *deltas) = get_method(name), make_values((97, 701), dtype=torch.float32, count=3)
    inputs = [base, *deltas] if method.takes_deltas else [base, deltas[0]]
    slab = make_slab(inputs, (97, 701), has_base=method.takes_deltas, block=97 * 701)
    place = Place("x", (97, 701), 7, (0, 1), block=97 * 701)
    rounds = method.start(place, {each.name: each.default for each in method.parameters}, "F32")
    assert rounds is not None
    gather, asked = next(rounds), 0
    with suppress(StopIteration):
        while True:
            assert isinstance(gather, StoredGather)
            assert gather.knows_stored
            asked += 1
            gather = rounds.send(gather.add_stored(slab, ()))
    assert asked == 1 + (name != "ramplus_tl")


# ------------------------------------------------------------------------------------------------------- refusals
def lower(slab: StoredSlab) -> structures.NativeSlab:
    lowered: structures.NativeSlab = slab.lowered._obj
    return lowered


def test_scores_are_known_to_samples_and_windows_alone() -> None:
    deltas = make_deltas(2, 0.5)
    slab = make_slab([torch.zeros(SIZE), *deltas], (SIZE,), has_base=True)
    scored = replace(slab, derived=Scores((0.0, 0.0), (1.0, 1.0)))
    counts = np.zeros(1 << 16, np.int64)
    for which, known in ((2, True), (3, True), (4, False), (IMPORTANCE, False)):
        for given in (slab, scored):
            if known and given is scored:
                given.sample(which, 0, 1000, 64)
                given.count_windows([(which, 0, 9)], [np.zeros((2, 3), np.int64)])
                continue
            with pytest.raises(ValueError, match="stored_sample: "):
                given.sample(which, 0, 1000, 64)
            with pytest.raises(ValueError, match="stored_windows: "):
                given.count_windows([(which, 0, 9)], [np.zeros((2, 3), np.int64)])
        with pytest.raises(ValueError, match="stored_upper: "):
            scored.count_upper([which], [counts])


@pytest.mark.parametrize(
    ("field", "value"), [("kind", 2), ("kind", -1), ("rows", 39), ("columns", 0), ("divergences", 0)]
)
def test_importances_of_fewer_rows_than_there_are_are_refused(field: str, value: int) -> None:
    before, after = make_rows()
    slab = make_slab([before, after], tuple(before.shape))
    slab = replace(slab, derived=Importances(slab.find_divergences(COLUMNS), COLUMNS))
    counts = np.zeros(1 << 15, np.int64)
    slab.count_upper([IMPORTANCE], [counts])
    derived = structures.NativeDerived.from_address(lower(slab).derived)
    setattr(derived, field, value)
    with pytest.raises(ValueError, match="stored_upper: "):
        slab.count_upper([IMPORTANCE], [counts])


@pytest.mark.parametrize("columns", [-1, 0, 7, 1 << 62])
def test_divergences_are_of_whole_rows(columns: int) -> None:
    slab = make_slab([torch.ones(10), torch.ones(10)], (10,))
    out = np.zeros(10)
    assert native.call("stored_divergences", slab.lowered, columns, out.ctypes.data) == -2
    assert native.call("stored_divergences", slab.lowered, 5, out.ctypes.data) == 0
    assert isinstance(lower(slab), ctypes.Structure)

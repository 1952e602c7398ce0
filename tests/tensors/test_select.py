"""Exactly the m largest magnitudes are selected, as a stable sort does."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergemill.engine.tensors import select
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.dtypes import NAMES, TORCH_DTYPES
from mergemill.engine.tensors.histograms import Derive
from mergemill.engine.tensors.kernels import Partial, Rounds, add_partials
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import (
    SELECT_ROUNDS,
    VALUE_ROUNDS,
    find_ranked,
    magnitudes,
    mark_largest,
    select_largest,
    select_share,
)
from mergemill.engine.tensors.slabs import BLOCK
from mergemill.engine.tensors.windows import Window


@pytest.fixture(params=["windows", "histograms", "wrong windows"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the m-th largest is found: the usual way, without windows, with one that it is not in."""
    if request.param == "histograms":
        monkeypatch.setattr(select, "choose_window", lambda *_: None)
    if request.param == "wrong windows":
        monkeypatch.setattr(select, "choose_window", lambda sample, rank, size, most: Window(most - 1, most))
    return str(request.param)


def find_cuts(
    inputs: Sequence[Tensor],
    wanted: Sequence[Sequence[int]],
    *,
    slab: int,
    block: int = BLOCK,
    derive: Derive = magnitudes,
    signed: bool = False,
) -> tuple[tuple[Cut, ...], ...]:
    place = Place("x", (len(inputs[0]),), 0, tuple(range(len(inputs))), block=block)
    rounds = select_largest(place, wanted, NAMES[inputs[0].dtype], derive, signed=signed)
    cuts, passes = drive(rounds, inputs, place, slab)
    assert passes <= SELECT_ROUNDS[NAMES[inputs[0].dtype]]
    return cuts


def drive(rounds: Rounds, inputs: Sequence[Tensor], place: Place, slab: int) -> tuple[Any, int]:
    """Drive the rounds over slabs, whose partial sums are added from the last to the first; returns also how many."""
    passes = 0
    try:
        gather = next(rounds)
        while True:
            total: Partial = ()
            for start in reversed(range(0, place.size, slab)):
                slabs = [x[start : start + slab].clone() for x in inputs]
                total = add_partials(gather(slabs, place.at(start)), total)
            passes += 1
            gather = rounds.send(total)
    except StopIteration as finished:
        return finished.value, passes


def mark(x: Tensor, cut: Cut, *, slab: int, block: int = BLOCK) -> Tensor:
    """Return what `mark_largest` says, slab by slab; its output memory is NaN before."""
    place = Place("x", (len(x),), 0, (0,), block=block)
    marks = [
        mark_largest(here.abs(), cut, place.at(i * slab), torch.full_like(here, torch.nan))
        for i, here in enumerate(x.split(slab))
    ]
    return torch.cat(marks)


def choose_by_sorting(x: Tensor, count: int) -> np.ndarray:
    """Return the same by a stable sort; bit patterns, so that NumPy's own comparison plays no part."""
    magnitude = np.abs(x.numpy())
    kept = np.zeros(len(magnitude))
    kept[np.argsort(-magnitude, kind="stable")[:count]] = 1
    return kept


def check(x: Tensor, count: int, *, slab: int, block: int = BLOCK) -> None:
    ((cut,),) = find_cuts([x], [(count,)], slab=slab, block=block)
    marks = mark(x, cut, slab=slab, block=block)
    kept = choose_by_sorting(x, count)
    assert int(marks.sum()) == count
    assert np.array_equal(marks.numpy(), kept)
    assert cut.threshold == np.sort(np.abs(x.numpy()))[::-1][count - 1]
    assert cut.above == np.sum(np.abs(x.numpy()) > cut.threshold)
    assert cut.above + cut.ties == count


def arrays(width: int) -> st.SearchStrategy[list[float]]:
    """Return lists with heavy ties, zeros of both signs, denormals and anything finite."""
    tiny = float(np.finfo(f"f{width // 8}").smallest_subnormal)
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, tiny, -tiny, 3 * tiny])
    any_value = st.floats(width=width, allow_nan=False, allow_infinity=False)
    return st.lists(few, min_size=1, max_size=60) | st.lists(few | any_value, min_size=1, max_size=60)


@settings(max_examples=50)
@given(arrays(32), st.data())
def test_float32_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    check(torch.tensor(values, dtype=torch.float32), count, slab=data.draw(st.sampled_from([4, 8, 64])), block=4)


@settings(max_examples=25)
@given(arrays(64), st.data())
def test_float64_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    check(torch.tensor(values, dtype=torch.float64), count, slab=data.draw(st.sampled_from([4, 64])), block=4)


SIZE = 2 * BLOCK + 5
CASES = {
    "all equal": torch.full((SIZE,), -1.5),
    "zeros": torch.zeros(SIZE),
    "denormals": torch.arange(SIZE, dtype=torch.float32) % 7 * 1e-45,
    "few values": torch.from_numpy(np.random.default_rng(1).integers(-3, 4, SIZE).astype(np.float32)),
    "normal": torch.from_numpy(np.random.default_rng(2).standard_normal(SIZE).astype(np.float32)),
    "as bfloat16": torch.from_numpy(np.random.default_rng(3).standard_normal(SIZE)).bfloat16().float(),
    "huge": torch.from_numpy(np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)) * 1e38,
    "one in a million": (torch.arange(SIZE) == SIZE - 1).float(),
}


@pytest.mark.parametrize("slab", [BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("name", CASES)
def test_large_tensors_equal_a_stable_sort(name: str, slab: int) -> None:
    for count in (1, SIZE // 3, SIZE):
        check(CASES[name], count, slab=slab)


@pytest.mark.parametrize("count", [1, 1000, SIZE])
def test_large_float64_tensors_equal_a_stable_sort(count: int) -> None:
    check(CASES["normal"].double() + 1e-12 * CASES["few values"].double(), count, slab=2 * BLOCK)


def test_several_inputs_are_searched_at_once_and_some_not_at_all() -> None:
    inputs = [CASES["normal"], CASES["few values"], CASES["huge"]]
    cuts = find_cuts(inputs, [(1000,), (), (7,)], slab=BLOCK)
    assert cuts[1] == ()
    alone = [find_cuts([inputs[i]], [(count,)], slab=2 * BLOCK)[0] for i, count in ((0, 1000), (2, 7))]
    assert [cuts[0], cuts[2]] == alone


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_of_one_input_share_the_passes(name: str) -> None:
    ranks = (1, 2, SIZE // 3, SIZE // 3, SIZE)
    (together,) = find_cuts([CASES[name]], [ranks], slab=2 * BLOCK)
    apart = [find_cuts([CASES[name]], [(rank,)], slab=BLOCK)[0][0] for rank in ranks]
    assert list(together) == apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_signed_values_equal_a_stable_sort(name: str, dtype: torch.dtype) -> None:
    x = CASES[name].to(dtype, copy=True)
    x[::7] = -0.0
    ranks = (1, 1000, SIZE // 2, SIZE - 1, SIZE)
    (cuts,) = find_cuts([x], [ranks], slab=BLOCK, derive=as_they_are, signed=True)
    order = np.argsort(-x.numpy(), kind="stable")
    for cut, count in zip(cuts, ranks, strict=True):
        place = Place("x", (SIZE,), 0, (0,))
        marks = mark_largest(x, cut, place, torch.empty_like(x)).numpy()
        assert cut.threshold == x[order[count - 1]]
        assert np.array_equal(np.flatnonzero(marks), np.sort(order[:count]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_nan_is_less_than_all_signed_values(dtype: torch.dtype) -> None:
    x = CASES["normal"].to(dtype, copy=True)
    x[::5] = math.nan
    negative = torch.where(x.isnan(), torch.tensor(-math.nan, dtype=dtype), x)
    ranks = (1000, SIZE // 2, SIZE - 1)
    found, same = (find_cuts([each], [ranks], slab=BLOCK, derive=as_they_are, signed=True) for each in (x, negative))
    assert repr(found) == repr(same)  # the last is NaN, which equals nothing
    descending = np.sort(x[~x.isnan()].numpy())[::-1]
    assert [cut.threshold for cut in found[0]][:2] == [descending[999], descending[SIZE // 2 - 1]]


@settings(max_examples=50)
@given(arrays(32), st.data())
def test_signed_float32_equals_a_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    x = torch.tensor(values, dtype=torch.float32)
    ((cut,),) = find_cuts([x], [(count,)], slab=8, block=4, derive=as_they_are, signed=True)
    assert cut.threshold == np.sort(x.numpy())[::-1][count - 1]
    assert cut.above == np.sum(x.numpy() > cut.threshold)


def as_they_are(tensors: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
    return tensors


def test_a_value_derived_from_several_inputs_is_ranked() -> None:
    left, right = CASES["normal"], CASES["few values"]
    ((cut,),) = find_cuts([left, right], [(500,)], slab=BLOCK, derive=lambda x, _: [(x[0] * x[1]).abs_()])
    assert cut.threshold == np.sort(np.abs((left * right).numpy()))[::-1][499]


@pytest.mark.parametrize("dtype", VALUE_ROUNDS, ids=str)
def test_values_alone_need_no_pass_for_ties(dtype: str) -> None:
    x = CASES["normal"].to(TORCH_DTYPES[dtype])
    place = Place("x", (SIZE,), 0, (0,))
    (found,), passes = drive(find_ranked(place, [(3, SIZE)], dtype), [x], place, SIZE)
    assert found == (float(x.abs().sort().values[-3]), float(x.abs().min()))
    assert passes <= VALUE_ROUNDS[dtype]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", CASES)
def test_a_share_is_of_what_is_not_0(name: str, fraction: float) -> None:
    x, place = CASES[name], Place("x", (SIZE,), 0, (0,))
    cut, _ = drive(select_share(place, fraction, "F32"), [x], place, 2 * BLOCK)
    count = int(fraction * int((x != 0).sum()))
    if not count:
        assert cut is None
        return
    assert np.array_equal(mark(x, cut, slab=SIZE).numpy(), choose_by_sorting(x, count))


def test_a_sample_saves_the_histograms(way: str) -> None:
    """Also where rows differ much in scale, and where a few values are most elements."""
    normal = torch.from_numpy(np.random.default_rng(6).standard_normal((512, 1024)).astype(np.float32))
    scaled = normal * torch.logspace(-2, 2, 512)[:, None]
    rounded = (normal * 3).round()
    for x in (normal.view(-1), scaled.view(-1), rounded.view(-1)):
        place = Place("x", (len(x),), 0, (0,))
        ((cut,),), passes = drive(select_largest(place, [(200_000,)], "F32"), [x], place, BLOCK)
        assert passes == {"windows": 2, "histograms": 4, "wrong windows": 5}[way]
        assert cut.threshold == x.abs().sort().values[-200_000]


def test_infinities_are_the_largest() -> None:
    x = torch.tensor([1.0, -torch.inf, 3.0, torch.inf])
    check(x, 1, slab=BLOCK)
    check(x, 3, slab=BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numbers", [SIZE - 3, SIZE // 2])
def test_every_nan_is_larger_than_all_magnitudes_whatever_its_sign(numbers: int, dtype: torch.dtype) -> None:
    """The signs are those that a machine sets: of a derived value that is no number, nobody promises one."""
    x = CASES["normal"].abs().to(dtype)
    missing = SIZE - numbers
    x[:missing:2], x[1:missing:2] = math.nan, -math.nan
    ranks = (1, missing, missing + 1, SIZE)
    (found,) = find_cuts([x], [ranks], slab=BLOCK, derive=as_they_are)
    kept = [int(mark(x, cut, slab=BLOCK).sum()) for cut in found]
    assert kept == [0, 0, 1, numbers]
    assert [math.isnan(cut.threshold) for cut in found] == [True, True, False, False]
    assert found[2].threshold == float(x[~x.isnan()].max())

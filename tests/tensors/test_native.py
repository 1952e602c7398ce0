"""The native loops give the bits of the torch operations that they stand for."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from mergemill.engine.methods.gram import combine_linearly
from mergemill.engine.methods.linear import linear
from mergemill.engine.methods.task_vectors import add_agreeing_deltas, add_deltas
from mergemill.engine.methods.trim import Trim, apply_trims
from mergemill.engine.tensors import native
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.digits import Digits
from mergemill.engine.tensors.drift import Watch, make_drift
from mergemill.engine.tensors.exact import sum_absolute, sum_products
from mergemill.engine.tensors.histograms import search_keys
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import drop_with_probability
from mergemill.engine.tensors.slabs import BLOCK

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native loops were not built: there is no C compiler")

SIZES = (1, 31, 1024, 1025, BLOCK - 1, 2 * BLOCK + 77)
ODD = [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@contextmanager
def plain() -> Iterator[None]:
    """Without the library."""
    with patch.object(native, "load", lambda: None):
        yield


def make_slabs(size: int, count: int = 3) -> list[Tensor]:
    """Return slabs with every kind of number, many of them equal."""
    stream = np.random.default_rng(size)
    slabs = [torch.from_numpy(stream.standard_normal(size).astype(np.float32)).bfloat16().float() for _ in range(count)]
    for i, slab in enumerate(slabs):
        odd = torch.tensor(ODD[i:] + ODD[:i])[: max(0, size - 8)]
        slab[: len(odd)] = odd
    return slabs


def bits(value: Tensor) -> bytes:
    return value.numpy().tobytes()


def copy(slabs: list[Tensor]) -> list[Tensor]:
    return [slab.clone() for slab in slabs]


def check(make: Callable[[list[Tensor]], Tensor], size: int) -> None:
    """Compare what `make` makes of the same slabs with and without the library."""
    slabs = make_slabs(size)
    assert native.suits(*slabs)
    ours = make(copy(slabs))
    with plain():
        assert not native.suits(*slabs)
        theirs = make(copy(slabs))
    # A NaN's sign and payload are nobody's promise.
    assert bits(torch.nan_to_num(ours, 7.0)) == bits(torch.nan_to_num(theirs, 7.0))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_of_models(size: int, normalize: bool) -> None:
    check(lambda x: linear(x, weight=(0.3, -1.7, 1 / 3), normalize=normalize), size)
    check(lambda x: linear(x[:1], weight=(0.1,), normalize=normalize), size)
    for weight in [(0.0, 0.7, 0.0), (0.5, 0.0, -0.1), (1e-60, 1e-45, 2.0), (0.0, 0.0, 0.0)]:  # of what has no weight
        check(lambda x, w=weight: linear(x, weight=w, normalize=normalize and any(w)), size)
    check(lambda x: combine_linearly(x, (0.3, 0.0, 1e30)), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [(0.3, 1 / 3), (0.0, -1.5), (1.0, -1.0), (0.0, 0.0), (-0.0, 1e-60)])
def test_sums_of_task_vectors(size: int, normalize: bool, weight: tuple[float, float]) -> None:
    check(lambda x: add_deltas(x[0], x[1:], weight, lambda_=0.7, normalize=normalize), size)
    check(lambda x: add_agreeing_deltas(x[0], x[1:], weight, lambda_=0.7, normalize=normalize), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [BLOCK, 1000, 3 * BLOCK, BLOCK + 5])
def test_sums_in_float64(size: int, block: int) -> None:
    left, right = (slab.nan_to_num(0.5, 2.0, -2.0) for slab in make_slabs(size, 2))
    found = sum_absolute(left, block), sum_products(left, right, block)
    with plain():
        assert found == (sum_absolute(left, block), sum_products(left, right, block))
    assert float(found[0]) == pytest.approx(left.double().abs().sum().item(), rel=1e-12)
    assert float(found[1]) == pytest.approx((left.double() * right.double()).sum().item(), rel=1e-9)


def test_sums_of_what_is_not_finite() -> None:
    slab = torch.tensor(ODD)
    with plain():
        expected = sum_absolute(slab), sum_absolute(slab[:-1])
    assert np.isnan([float(sum_absolute(slab)), float(expected[0])]).all()
    assert float(sum_absolute(slab[:-1])) == float(expected[1]) == np.inf


@pytest.mark.parametrize("start", [0, BLOCK, 700])
@pytest.mark.parametrize("size", SIZES)
def test_random_masks(start: int, size: int) -> None:
    place = Place("tensor", (10 * BLOCK,), 3, (1,), start)
    check(lambda x: drop_with_probability(x[0], place, 1, 0.3), size)
    check(lambda x: drop_with_probability(x[0], place, 1, 1 - 2**-40), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [0, 1, 5])
def test_trims(size: int, block: int) -> None:
    place = Place("tensor", (10 * BLOCK,), 3, (1,), BLOCK)
    threshold = float(make_slabs(size)[0][size // 2].abs().nan_to_num(0.5))
    cut = Cut(threshold, 0, 0, block, 3)
    check(lambda x: _trimmed(x[0], Trim(cut, 0.5), place), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [BLOCK, 1000, 3 * BLOCK, BLOCK + 5])
@pytest.mark.parametrize("deltas", [False, True])
def test_drifts(size: int, block: int, deltas: bool) -> None:
    base, *models = (slab.nan_to_num(0.5, 2.0, -2.0) for slab in make_slabs(size))

    def see(base: Tensor | None) -> tuple[object, ...]:
        watch = Watch(block, deltas=deltas)
        watch.look(models, base)
        watch.compare(models[1] * 3)
        assert watch.drift() == make_drift(watch.partial())
        return watch.partial()

    found = see(base), see(None)
    with plain():
        assert found == (see(base), see(None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_is_counted(size: int, dtype: torch.dtype) -> None:
    written = make_slabs(size)[2].to(dtype)
    assert native.suits_halves(written)
    assert native.count_broken(written) == size - int(torch.isfinite(written).sum())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_ranks(size: int, signed: bool) -> None:
    values = make_slabs(size)[0]
    values = values if signed else values.abs()
    values[values.isnan()] = -math.nan  # as the machine makes it
    if size > 8:
        assert values.isnan().any()
    place = Place("tensor", (size,), 3, (1,))
    wanted = [sorted({1, size // 3 + 1, size})]

    def find() -> list[object]:
        rounds = search_keys(wanted, Digits("F32", signed), lambda x, _: x)
        gathered = [next(rounds)([values.clone()], place)]
        with suppress(StopIteration):
            while True:
                gathered.append(rounds.send(gathered[-1])([values.clone()], place))
        return [[counts.tolist() for counts in each] for (each,) in gathered]

    found = find()
    with plain():
        assert found == find()


def test_what_lies_beyond_all_bins_is_counted_within_them() -> None:
    everything = torch.tensor([0, 1, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    assert native.count_first(everything, 0, 16, 1 << 15).nonzero()[0].tolist() == [0, (1 << 15) - 1]
    assert native.count_first(everything, 0, 16, 1 << 15).tolist()[-1] == 3
    assert native.count_within(everything, 1, 1 << 17, 16).tolist() == [1, 0]


def _trimmed(slab: Tensor, trim: Trim, place: Place) -> Tensor:
    apply_trims([slab], [trim], place)
    return slab


@pytest.mark.parametrize(
    "slab",
    [torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4, 4)[:, 1]],
    ids=["float64", "bfloat16", "strided"],
)
def test_other_slabs_are_left_to_torch(slab: Tensor) -> None:
    assert not native.suits(slab)


def test_the_library_can_be_left_out() -> None:
    script = "from mergemill.engine.tensors import native; print(native.load())"
    environment = {**os.environ, "MERGEMILL_NATIVE": "0"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "None\n"

"""Sums are exact, so that order and grouping are free; inside a block the order is the documented one."""

import math
import random
import sys
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemill.engine.tensors.exact import ExactSum, Extremes, exact, find_extremes, sum_blocks, sum_products, sum_rows
from mergemill.engine.tensors.kernels import add_partials
from mergemill.engine.tensors.slabs import BLOCK

finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(min_value=-1e300, max_value=1e300)
anything = st.floats()


def total(values: list[float]) -> ExactSum:
    return reduce(ExactSum.__add__, map(exact, values), ExactSum())


def same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


def make_block_values(size: int, seed: int = 0) -> np.ndarray:
    """Return values of very different magnitudes, whose sum depends on the order of additions."""
    stream = np.random.default_rng(seed)
    return stream.standard_normal(size) * 2.0 ** stream.integers(-40, 40, size)


def add_in_documented_order(block: list[float]) -> float:
    """Return a block's sum in plain Python: 64 rows of 1,024 lanes, then 32 rows of 32, then exactly."""
    block = block + [0.0] * (BLOCK - len(block))
    for rows, lanes in ((64, 1024), (32, 32)):
        added = block[:lanes]
        for row in range(1, rows):
            added = [a + b for a, b in zip(added, block[row * lanes : (row + 1) * lanes], strict=True)]
        block = added
    return math.fsum(block)


@given(finite)
def test_one_value_comes_back(value: float) -> None:
    assert float(exact(value)) == value


@given(st.lists(moderate, max_size=40))
def test_equals_fsum(values: list[float]) -> None:
    assert float(total(values)) == math.fsum(values)


@given(st.lists(anything, max_size=20), st.randoms(use_true_random=False), st.integers(0, 20))
def test_order_and_grouping_are_free(values: list[float], chance: random.Random, cut: int) -> None:
    shuffled = chance.sample(values, len(values))
    grouped = total(shuffled[:cut]) + total(shuffled[cut:])
    assert grouped.scaled == total(values).scaled
    assert same(float(grouped), float(total(values)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([-0.0], 0.0),
        ([-0.0, -0.0], 0.0),
        ([1e308, 1e308], math.inf),
        ([-1e308, -1e308], -math.inf),
        ([1e308, 1e308, -1e308], 1e308),
        ([math.inf, 1.0, -1e308], math.inf),
        ([-math.inf, 1e308], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([math.nan, math.inf], math.nan),
        ([5e-324], 5e-324),
        ([5e-324] * 3, 15e-324),
        ([1.0, 5e-324, -1.0], 5e-324),
        ([sys.float_info.max, 5e-324, -sys.float_info.max], 5e-324),
        ([2.0**53, 1.0, 1.0], 2.0**53 + 2),
        ([2.0**53, 1.0], 2.0**53),
        ([2.0**53, 1.0, 5e-324], 2.0**53 + 2),
    ],
)
def test_special_values(values: list[float], expected: float) -> None:
    assert same(float(total(values)), expected)


@pytest.mark.parametrize("size", [0, 1, 1023, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_a_block_is_added_in_the_documented_order(size: int) -> None:
    values = make_block_values(size)
    blocks = [add_in_documented_order(values[i : i + BLOCK].tolist()) for i in range(0, size, BLOCK)]
    assert sum_blocks(torch.from_numpy(values)).scaled == total(blocks).scaled
    assert float(sum_blocks(torch.from_numpy(values))) == math.fsum(blocks)


def test_the_order_within_a_block_matters_to_these_values() -> None:
    values = make_block_values(BLOCK)
    backwards = torch.from_numpy(values[::-1].copy())
    assert sum_blocks(backwards).scaled != sum_blocks(torch.from_numpy(values)).scaled


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, BLOCK - 1), st.data())
def test_any_cut_at_blocks_gives_the_same_sum(blocks: int, rest: int, data: st.DataObject) -> None:
    values = torch.from_numpy(make_block_values(blocks * BLOCK + rest, seed=blocks))
    cut = data.draw(st.integers(0, blocks)) * BLOCK
    assert sum_blocks(values[cut:]) + sum_blocks(values[:cut]) == sum_blocks(values)


def test_zeros_after_the_end_add_nothing() -> None:
    values = make_block_values(1000)
    longer = np.concatenate([values, np.zeros(5000)])
    assert sum_blocks(torch.from_numpy(values)) == sum_blocks(torch.from_numpy(longer))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.inf], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan], math.nan),
        ([1e308] * 3, math.inf),
        ([-0.0], 0.0),
        ([5e-324, 5e-324], 1e-323),
    ],
)
@pytest.mark.parametrize("before", [0, 5, BLOCK])
def test_blocks_of_special_values(values: list[float], expected: float, before: int) -> None:
    padded = torch.tensor([0.0] * before + values, dtype=torch.float64)
    assert same(float(sum_blocks(padded)), expected)


def test_special_values_of_one_block_do_not_depend_on_the_others() -> None:
    values = torch.zeros(3 * BLOCK, dtype=torch.float64)
    values[5], values[BLOCK + 5], values[-1] = 1e308, 1e308, -1e308
    assert float(sum_blocks(values)) == 1e308, "beyond float64 only in between"


def test_products_are_float64() -> None:
    stream = np.random.default_rng(3)
    left, right = (torch.from_numpy(stream.standard_normal(BLOCK + 77)) for _ in range(2))
    products = (left * right).numpy()
    blocks = [
        add_in_documented_order(products[:BLOCK].tolist()),
        add_in_documented_order(products[BLOCK:].tolist()),
    ]
    assert float(sum_products(left, right)) == math.fsum(blocks)


def test_a_partial_sum_of_a_large_tensor_stays_small() -> None:
    values = torch.from_numpy(make_block_values(4 * BLOCK))
    assert sum_blocks(values).scaled.bit_length() < 8 * 400, "travels between workers"


def add_by_halves(row: list[float]) -> float:
    """Return a row's sum in plain Python: the right half onto the left until one value is left."""
    while len(row) > 1:
        half = -(-len(row) // 2)
        row = [sum(row[i::half]) for i in range(half)]
    return row[0]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (7, 2), (3, 1000), (40, 37), (2, 4097), (4097, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_added_by_halves(shape: tuple[int, int], turned: bool) -> None:
    values = torch.from_numpy(make_block_values(shape[0] * shape[1])).view(shape)
    given = values.T.clone(memory_format=torch.contiguous_format).T if turned else values.clone()
    assert sum_rows(given).tolist() == [add_by_halves(row) for row in values.tolist()]


def test_a_row_of_one_value_is_that_value() -> None:
    values = make_block_values(9)
    assert sum_rows(torch.from_numpy(values.copy()).view(9, 1)).tolist() == values.tolist()


def test_the_sum_of_a_row_does_not_hang_on_the_other_rows() -> None:
    values = torch.from_numpy(make_block_values(60 * 333)).view(60, 333)
    whole = sum_rows(values.clone())
    assert torch.equal(torch.cat([sum_rows(values[:17].clone()), sum_rows(values[17:].clone())]), whole)


def test_the_sum_of_a_row_keeps_no_room_of_the_row() -> None:
    values = torch.ones(3, 1000, dtype=torch.float64)
    assert sum_rows(values).untyped_storage().nbytes() == 3 * 8


def test_extremes_add_up_to_those_of_all() -> None:
    values = torch.tensor([3.0, -1.0, 7.0, 0.0])
    left, right = find_extremes(values[:1]), find_extremes(values[1:])
    assert left + right == right + left + Extremes() == find_extremes(values) == Extremes(-1.0, 7.0)
    assert add_partials((left,), (right,)) == (Extremes(-1.0, 7.0),)

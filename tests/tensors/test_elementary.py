"""exp, log and tanh are right to the last bits, and the same bits everywhere."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mergemill.engine.tensors.elementary import PIECE, exp_, log_, tanh_

Function = Callable[[Tensor], Tensor]
STREAM = np.random.default_rng(5)
WIDTHS = (1e-12, 1e-3, 0.3, 1.0, 20.0, 700.0)
SYMMETRIC = np.concatenate([STREAM.uniform(-width, width, 20_000) for width in WIDTHS])
POSITIVE = np.concatenate([np.exp(SYMMETRIC), STREAM.uniform(0.5, 2.0, 20_000), [1e-300, 1e300, 1.0, 0.5**0.5]])
CASES = [
    pytest.param(exp_, np.exp, SYMMETRIC, id="exp"),
    pytest.param(tanh_, np.tanh, SYMMETRIC, id="tanh"),
    pytest.param(log_, np.log, POSITIVE, id="log"),
]


@pytest.mark.parametrize(("ours", "theirs", "values"), CASES)
def test_float64_is_right_to_a_few_units_in_the_last_place(
    ours: Function, theirs: np.ufunc, values: np.ndarray
) -> None:
    result, expected = ours(torch.from_numpy(values.copy())).numpy(), theirs(values)
    assert np.max(np.abs(result - expected) / np.spacing(np.abs(expected))) <= 4


@pytest.mark.parametrize(("ours", "theirs", "values"), CASES)
def test_rounded_to_float32_hardly_one_differs(ours: Function, theirs: np.ufunc, values: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        result, expected = (
            x.astype(np.float32) for x in (ours(torch.from_numpy(values.copy())).numpy(), theirs(values))
        )
    assert np.sum(result != expected) <= 1e-6 * len(values)


# What depends on these (arcee_fusion, pcb) gives the same bits on every machine, and for ever.
GOLDEN = {"exp": "7cc2bee64f61dca8", "tanh": "93d77c29a8f7744c", "log": "8d897a36acdc6fee"}


@pytest.mark.parametrize(("ours", "theirs", "values"), CASES)
def test_bits_are_pinned(ours: Function, theirs: np.ufunc, values: np.ndarray) -> None:
    steps = np.arange(1, 100_001) / 4096  # exact, whatever the machine
    result = ours(torch.from_numpy(steps - 10 if theirs is not np.log else steps)).numpy()
    assert hashlib.sha256(result.astype("<f8").tobytes()).hexdigest()[:16] == GOLDEN[theirs.__name__]


@pytest.mark.parametrize(("ours", "theirs", "values"), CASES)
def test_an_element_does_not_depend_on_the_others(ours: Function, theirs: np.ufunc, values: np.ndarray) -> None:
    whole = ours(torch.from_numpy(values.copy()))
    for start, stop in ((0, 1), (3, 10), (PIECE - 1, PIECE + 2), (5, 2 * PIECE + 11)):
        assert torch.equal(ours(torch.from_numpy(values[start:stop].copy())), whole[start:stop])


def test_ends_of_the_range() -> None:
    values = torch.tensor([-torch.inf, -1e300, -708.0, 0.0, 709.0, 1e300, torch.inf], dtype=torch.float64)
    powers = exp_(values.clone())
    assert powers[0] == powers[1] == powers[2] < 1e-307
    assert powers[3] == 1
    assert 1e307 < powers[4] == powers[5] == powers[6] < torch.inf
    assert tanh_(values.clone())[[0, 1, 3, 5, 6]].tolist() == [-1, -1, 0, 1, 1]
    assert tanh_(torch.tensor([5e-324, -1e-200], dtype=torch.float64)).tolist() == [5e-324, -1e-200]
    assert log_(torch.ones(1, dtype=torch.float64)) == 0
    assert exp_(torch.empty(0, dtype=torch.float64)).shape == (0,)

"""Each approximation against its formula in float64, whatever the slabs in which rows stream by."""

import numpy as np
import pytest
import torch
from oracles import transplants as oracles

from mergemill.engine.transplants.affine import Affine, sum_pairs
from mergemill.engine.transplants.focus import weigh_by_sparsemax
from mergemill.engine.transplants.john_hewitt import fit_normal
from mergemill.engine.transplants.landmark_pca import align
from mergemill.engine.transplants.least_squares import solve_barycentric
from mergemill.engine.transplants.mp_rope import Rotary, pursue_turned, turn
from mergemill.engine.transplants.nearest import interpolate, soften
from mergemill.engine.transplants.normal import make_normals
from mergemill.engine.transplants.omp import pursue
from mergemill.engine.transplants.stb import find_basis
from mergemill.engine.transplants.streams import NONE, Combination, Passes, combine_rows, gather_rows, pass_over
from mergemill.engine.transplants.subword import weigh_pieces

Rows = np.ndarray

SHARED, NEW = 150, 5
WIDTHS = [(16, 24), (24, 16), (16, 16)]
PRECISE = {torch.float64: 1e-9, torch.float32: 5e-5}


def make(widths: tuple[int, int], seed: int = 0) -> tuple[Rows, Rows, Rows]:
    """Return shared rows of both, which have something in common, and new ones of the donor."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((SHARED + NEW, 10))
    x, w = (
        common @ rng.standard_normal((10, width)) + 0.3 * rng.standard_normal((SHARED + NEW, width)) for width in widths
    )
    return x[:SHARED], w[:SHARED], x[SHARED:]


def stream(rows: Rows, dtype: torch.dtype, step: int) -> Passes:
    return pass_over(torch.from_numpy(rows).to(dtype), step)


def check(found: Combination, w: Rows, expected: list[Rows], dtype: torch.dtype) -> None:
    got = combine_rows(stream(w, dtype, 37), found, w.shape[1]).double().numpy()
    np.testing.assert_allclose(got, np.array(expected), atol=PRECISE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("k", [1, 6, 14])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_omp(widths: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    x, w, y = make(widths)
    targets = torch.from_numpy(y).to(dtype)
    found = pursue(targets, stream(x, dtype, 64), k)
    check(found, w, [oracles.omp(each, x, w, k) for each in y], dtype)
    again = pursue(targets, stream(x, dtype, 1000), k)
    assert torch.equal(found.numbers, again.numbers)


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
def test_omp_takes_the_first_of_equal_rows(dtype: torch.dtype) -> None:
    """Wherever they lie: a library's product rounds the same rows differently at a matrix's edge."""
    x, _, y = make((61, 61))
    doubled = np.concatenate([x, x[::-1], -0.0 * x[:1], x])
    targets = torch.from_numpy(y).to(dtype)
    found, plain = (pursue(targets, stream(rows, dtype, 47), 20).numbers for rows in (doubled, x))
    assert torch.equal(found, plain)


def test_omp_ends_where_nothing_is_left_or_added() -> None:
    x, w, y = make((16, 16))
    x[3] = x[2] = 50 * y[0]  # of equals the first, and one is enough
    x[4] = np.nan
    x[5] = 0.0
    found = pursue(torch.from_numpy(np.vstack([y, np.zeros(16)])), stream(x, torch.float64, 11), 40)
    assert found.numbers[0].tolist() == [2] + 39 * [NONE]
    assert found.weights[0, 0] == pytest.approx(0.02)
    assert (found.numbers[1:-1] != NONE).sum(1).tolist() == [16] * 4, "k may be more than the width"
    assert not set(found.numbers.flatten().tolist()) & {3, 4, 5}
    assert (found.numbers[-1] == NONE).all()
    assert torch.isfinite(combine_rows(stream(w, torch.float64, 9), found, 16)).all()


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("weights", ["distance_proportional", "barycentric", "least_squares"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_common_interpolation(metric: str, weights: str, dtype: torch.dtype) -> None:
    for widths, k in ((WIDTHS[0], 1), (WIDTHS[1], 8), (WIDTHS[2], 40)):
        x, w, y = make(widths)
        found = interpolate(torch.from_numpy(y).to(dtype), stream(x, dtype, 41), k, metric, weights)
        expected = [oracles.interpolation(each, x, w, k, metric, weights) for each in y]
        check(found, w, expected, dtype)


def test_of_equally_near_rows_the_first_are_taken() -> None:
    x, _, y = make((16, 16))
    x[20:] = y[0]
    found = interpolate(torch.from_numpy(y[:1]), stream(x, torch.float64, 7), 3, "euclidean", "distance_proportional")
    assert found.numbers.tolist() == [[20, 21, 22]]
    assert found.weights.tolist() == [pytest.approx([1 / 3] * 3)]


def test_barycentric_weights_add_up_to_one_also_where_rows_depend_on_each_other() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 3))).double()
    rows[:, 3] = rows[:, 2]
    assert solve_barycentric(rows, rows[:, 0] * 2).sum(1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
def test_focus_and_wechsel(dtype: torch.dtype) -> None:
    x, w, y = make((16, 24))
    targets = torch.from_numpy(y).to(dtype)
    check(weigh_by_sparsemax(targets, stream(x, dtype, 50)), w, [oracles.focus(each, x, w) for each in y], dtype)
    check(soften(targets, stream(x, dtype, 50), 10, 0.1), w, [oracles.wechsel(each, x, w) for each in y], dtype)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_landmark_pca_and_stb(widths: tuple[int, int]) -> None:
    x, w, y = make(widths)
    sums = sum_pairs(x, w)
    aligned = align(sums)
    np.testing.assert_allclose(aligned.move(y), [oracles.landmark_pca(each, x, w) for each in y], atol=1e-8)
    basis = find_basis(sums, stream(x, torch.float64, 40), stream(w, torch.float64, 33), 5)
    np.testing.assert_allclose(basis.move(y), [oracles.stb(each, x, w, 5) for each in y], atol=1e-8)


def test_landmark_pca_finds_a_turned_space() -> None:
    x, _, y = make((16, 16))
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
    np.testing.assert_allclose(align(sum_pairs(x, x @ turned + 3.0)).move(y), y @ turned + 3.0, atol=1e-9)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_mp_rope(widths: tuple[int, int]) -> None:
    x, w, y = make(widths)
    of_x, of_w = Rotary(8, 1e4), Rotary(4, 5e5)
    found, positions = pursue_turned(torch.from_numpy(y), stream(x, torch.float64, 40), 5, of_x)
    rows = turn(gather_rows(stream(w, torch.float64, 60), found.numbers, widths[1]), positions, of_w)
    expected = [oracles.mp_rope(each, x, w, 5, (8, 1e4), (4, 5e5)) for each in y]
    np.testing.assert_allclose((rows * found.weights[:, :, None]).sum(1).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("rows", [200, 10, 1])
def test_john_hewitt_draws_as_the_rows_are_distributed(rows: int) -> None:
    w = make((16, 24))[1]
    w = np.vstack([w, w + 1])[:rows]
    w[:, 3] = 7.0  # and a column that is constant
    found = fit_normal(rows, w.sum(0), w.T @ w)
    covariance = np.cov(w.T, bias=True)
    np.testing.assert_allclose(found.centre, w.mean(0))
    np.testing.assert_allclose(found.matrix.T @ found.matrix, covariance, atol=1e-4 * max(1e-9, np.trace(covariance)))


def test_random_rows_are_keyed_by_seed_tensor_and_row() -> None:
    rows = make_normals(1, "a", range(2000), 16)
    assert (make_normals(1, "a", [7], 16)[0] == rows[7]).all()
    assert abs(rows.mean()) < 0.02
    assert abs(rows.std() - 1) < 0.02
    assert all((other[0] != rows[0]).all() for other in (make_normals(2, "a", [0], 16), make_normals(1, "b", [0], 16)))


@pytest.mark.parametrize(
    ("how", "is_head", "weights"),
    [
        ("mean", False, [1 / 3] * 3),
        ("sum", True, [1.0] * 3),
        ("weighted_mean", False, [1 / 6, 2 / 6, 3 / 6]),
        ("weighted_mean", True, [3 / 6, 2 / 6, 1 / 6]),
        ("first_last", False, [0.0, 0.0, 1.0]),
        ("first_last", True, [1.0, 0.0, 0.0]),
    ],
)
def test_subword_weights(how: str, is_head: bool, weights: list[float]) -> None:
    found = weigh_pieces([np.array([5, 6, 7]), np.array([], int)], how, is_head=is_head)
    assert found.numbers.tolist() == [[5, 6, 7], [NONE] * 3]
    assert found.weights[0].tolist() == pytest.approx(weights)


def test_a_map_moves_rows() -> None:
    moved = Affine(np.ones(2), np.array([[1.0, 0, 2], [0, 1, 0]]), np.full(3, 5.0)).move(np.array([[2.0, 4.0]]))
    assert moved.tolist() == [[6.0, 8.0, 7.0]]

"""The best product of two thin matrices against the singular value decomposition in float64, in every way to it."""

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from mergemill.engine.tensors import cuts, leading
from mergemill.engine.tensors.cuts import Rows, Shape, cut, find_values, make_gram

SHAPES = [(90, 40), (40, 90), (50, 50), (1, 30), (30, 1)]


def make_matrix(shape: tuple[int, int], spectrum: str, seed: int = 0) -> np.ndarray:
    stream = default_rng(seed)
    flat = stream.standard_normal(shape)
    if spectrum == "flat":
        return flat
    if spectrum == "zero":
        return np.zeros(shape)
    left, values, right = np.linalg.svd(flat, full_matrices=False)
    places = np.arange(len(values))
    return left * (np.exp(-places / 3) if spectrum == "decaying" else places < 5) @ right


def rows_of(matrix: np.ndarray) -> Rows:
    whole = torch.from_numpy(matrix)
    return lambda start, stop: whole[start:stop].clone()


def best_loss(matrix: np.ndarray, rank: int) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


@pytest.mark.parametrize("way", ["gram", "exact"])
@pytest.mark.parametrize("spectrum", ["flat", "decaying", "rank 5", "zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_is_the_best_there_is(
    shape: tuple[int, int], spectrum: str, way: cuts.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "STEP", 200)  # elements, so that there are several steps
    monkeypatch.setattr(cuts, "_HELD", (900, 900))
    matrix = make_matrix(shape, spectrum)
    for rank in {1, min(6, *shape), min(shape)}:
        found = cut(rows_of(matrix), Shape(*shape), rank, way)
        made = (found.left * found.values @ found.right.T).numpy()
        error, whole = np.linalg.norm(matrix - made), np.linalg.norm(matrix)
        assert error <= 1.0001 * best_loss(matrix, rank) + 1e-7 * whole
        assert found.squares == pytest.approx(whole**2)
        assert np.sqrt(found.lost) == pytest.approx(error, abs=1e-6 * whole)


def test_a_cut_that_takes_random_vectors_is_near_the_best() -> None:
    for spectrum, most in (("flat", 1.02), ("decaying", 1.0001)):
        matrix = make_matrix((150, 100), spectrum)
        found = cut(rows_of(matrix), Shape(150, 100), 20, "randomized")
        made = (found.left * found.values @ found.right.T).numpy()
        assert np.linalg.norm(matrix - made) <= most * best_loss(matrix, 20) + 1e-9
        assert found.squares == pytest.approx(float((matrix**2).sum()))


@pytest.mark.parametrize("spectrum", ["flat", "decaying", "rank 5", "zero"])
def test_a_few_vectors_of_a_large_gram_matrix_are_as_good_as_all(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "SMALL", 64)
    monkeypatch.setattr(leading, "_BESIDE", 4)
    matrix = make_matrix((160, 200), spectrum)
    gram = torch.from_numpy(matrix @ matrix.T)
    vectors = leading.find_leading(gram, 6)
    assert torch.allclose(vectors.T @ vectors, torch.eye(6, dtype=torch.float64), atol=1e-12)
    lost = np.linalg.norm(matrix - vectors.numpy() @ (vectors.numpy().T @ matrix))
    assert lost <= 1.0001 * best_loss(matrix, 6) + 1e-7 * np.linalg.norm(matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_from_the_gram_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "STEP", 200)
    monkeypatch.setattr(cuts, "_HELD", (900, 900))
    matrix = make_matrix(shape, "flat")
    gram = make_gram(rows_of(matrix), Shape(*shape))
    assert torch.equal(gram, gram.T)
    np.testing.assert_allclose(find_values(gram).numpy(), np.linalg.svd(matrix, compute_uv=False), rtol=1e-7)

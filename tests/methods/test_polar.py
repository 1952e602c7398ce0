"""The orthogonal factor in float32: as exact as it says, for every spectrum of which it says anything."""

import pytest
import torch
from methods.made_matrices import check_close, make_deltas, merge_deltas
from torch import Tensor

from mergemill.engine.methods import leading, polar

SIDE = 256
EPS = torch.finfo(torch.float32).eps
SHAPES = pytest.mark.parametrize("shape", [(SIDE, SIDE + 70), (SIDE + 70, SIDE)], ids=str)


def make_matrix(shape: tuple[int, int], values: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a matrix of these singular values, as float32 has it, in float64; and its orthogonal factor."""
    left, right = (torch.linalg.qr(each)[0] for each in (make_deltas((side, len(values)), 1)[0] for side in shape))
    matrix = ((left * values) @ right.T * scale).float().double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    clear = values > max(shape) * EPS * values[0]
    return matrix, left[:, clear] @ right[clear]


SPECTRA = {
    "close": torch.linspace(3, 1, SIDE),
    "falling": torch.logspace(0, -1.3, SIDE),
    "a few strong": torch.cat([torch.tensor([20.0, 10.0]), torch.linspace(2, 1, SIDE - 2)]),
    "to nothing": torch.linspace(1, 1e-5, SIDE),
    "a few of nothing": torch.cat([torch.linspace(3, 1, SIDE - 20), torch.zeros(20)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@SHAPES
def test_the_factor_is_right_to_two_millionths(shape: tuple[int, int], spectrum: str) -> None:
    for scale in (1.0, 1e-30, 1e30):
        matrix, wanted = make_matrix(shape, SPECTRA[spectrum].double(), scale)
        found = polar.find_polar(matrix, max(shape) * EPS)
        assert found is not None
        check_close(found.factor, wanted, 2e-6)
        total = float((wanted * matrix).sum())
        assert abs(found.total - total) <= 1e-6 * total


def test_what_float32_does_not_give_has_no_answer() -> None:
    strong = torch.cat([torch.full((40,), 1e3), torch.linspace(2, 1, SIDE - 40)])
    for values in (strong, torch.logspace(0, -4, SIDE), torch.zeros(SIDE)):
        matrix, _ = make_matrix((SIDE, SIDE), values.double())
        assert polar.find_polar(matrix, SIDE * EPS) is None


@pytest.mark.parametrize("decades", [0, 3])
def test_matrices_with_and_without_an_answer_agree_with_float64(decades: int, monkeypatch: pytest.MonkeyPatch) -> None:
    side = leading.SMALLEST
    matrix, _ = make_matrix((side, side), torch.logspace(0.1, -decades, side, dtype=torch.float64))
    result = merge_deltas("iso_c", matrix.float())
    monkeypatch.setattr(leading, "SMALLEST", 10_000)
    check_close(result, merge_deltas("iso_c", matrix.float()), 2e-6)

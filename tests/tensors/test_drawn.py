"""Normal numbers are quantiles of uniform ones, keyed by position; what is cut and joined by columns is what it was."""

import statistics

import numpy as np
import pytest
import torch

from mergemill.engine.plan.memory import make_piece
from mergemill.engine.plan.values import OutputTensor
from mergemill.engine.runs.tasks.piece import merge_piece
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.channels import cut_columns, cut_rows, put_beside
from mergemill.engine.tensors.drawn import Drawn, Filled, Given, Noisy
from mergemill.engine.tensors.expressions import Expression, Held
from mergemill.engine.tensors.normal import draw_normal
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import draw_uniform
from mergemill.engine.tensors.redrawn import Redraw, Redrawn, pick_channels
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Workspace

SIZE = 3 * BLOCK + 7
PLACE = Place("layers.0.gate", (SIZE,), 5, ())


def evaluate(expression: Expression, *, slab: int = 1 << 18, parts: int = 1) -> torch.Tensor:
    """Return an expression's values, merged in slabs of a size and within the memory that the plan says."""
    tensor = OutputTensor("x", "F32", expression)
    whole = make_piece(tensor, Span(0, expression.size), 0, whole=True)
    workplace = Workplace(whole.projected.slab_bytes, 1)
    found = np.zeros(expression.size, np.float32)
    with workplace.lend(whole.projected.slab_bytes) as arena:
        for span, data in merge_piece(whole, {}, Workspace(arena), workplace, slab):
            found[span.start : span.stop] = data.view(np.float32)
    return torch.from_numpy(found).view(expression.shape)


def hold(rows: int, columns: int, *, seed: int = 0) -> Held:
    return Held(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def test_a_normal_number_is_the_quantile_of_the_uniform_one() -> None:
    uniform = draw_uniform(PLACE, 3, torch.empty(SIZE, dtype=torch.float64))
    normal = draw_normal(PLACE, 3, torch.empty(SIZE, dtype=torch.float64))
    assert uniform.min() > 0
    assert uniform.max() < 1
    quantile = statistics.NormalDist().inv_cdf  # by the same algorithm
    some = [*range(0, SIZE, 997), int(uniform.argmin()), int(uniform.argmax())]
    expected = torch.tensor([quantile(float(uniform[i])) for i in some], dtype=torch.float64)
    torch.testing.assert_close(normal[some], expected, rtol=1e-14, atol=1e-15)


def test_a_span_has_the_numbers_of_its_place() -> None:
    whole = draw_normal(PLACE, 3, torch.empty(SIZE, dtype=torch.float64))
    part = draw_normal(PLACE.at(BLOCK + 11), 3, torch.empty(BLOCK, dtype=torch.float64))
    assert torch.equal(part, whole[BLOCK + 11 : 2 * BLOCK + 11])


def test_rows_of_one_number_are_equal_and_others_differ() -> None:
    drawn = evaluate(Drawn(1, "layers.0.gate", (0, 0, 1), 50, "uniform", 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert float(drawn.abs().max()) <= 0.5


def test_what_is_filled_and_given_is_there() -> None:
    assert torch.equal(evaluate(Filled(0.5, (3, 4), "BF16")), torch.full((3, 4), 0.5))
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    given = Given("layers.0.gate", (3, 4), "digest", (0, 0, 1)).put(values)
    assert torch.equal(evaluate(given), torch.from_numpy(values[[0, 0, 1]]))


@pytest.mark.parametrize("slab", [BLOCK, 1 << 18])
def test_noise_hangs_on_the_place_alone(slab: int) -> None:
    weight = hold(1000, 300)
    noisy = evaluate(Noisy(weight, 0.25, 2.0, 7, "w", 1), slab=slab)
    numbers = draw_normal(Place("w", weight.shape, 7, ()), 1, torch.empty(weight.size, dtype=torch.float64))
    expected = (weight.tensor + (numbers * 0.25).float().view(weight.shape)) * 2.0
    assert torch.equal(noisy, expected)


@pytest.mark.parametrize("slab", [BLOCK, 1 << 18])
def test_cut_and_joined_matrices_are_what_they_were(slab: int) -> None:
    weight = hold(700, 360)
    noisy = Noisy(weight, 0.0, 1.5, 0, "w", 0)  # of blocks of its own
    for matrix, values in ((weight, weight.tensor), (noisy, weight.tensor * 1.5)):
        columns, rows = cut_columns(matrix, 3), cut_rows(matrix, 7)
        assert torch.equal(evaluate(columns[1], slab=slab), values[:, 120:240])
        assert torch.equal(evaluate(rows[2], slab=slab), values[200:300])
        assert torch.equal(evaluate(put_beside(columns), slab=slab), values)


@pytest.mark.parametrize("slab", [BLOCK, 1 << 18])
@pytest.mark.parametrize("axis", [0, 1])
def test_redrawn_channels_are_of_what_they_replace(axis: int, slab: int) -> None:
    weight = hold(900, 400, seed=axis)
    weight = Held(weight.tensor * 3 + 1)
    redraw = Redraw(3, "layers.0.mlp", 2, weight.shape[axis], 100)
    found = evaluate(Redrawn(weight, axis, redraw, "w"), slab=slab)
    picked = pick_channels(redraw)
    gone = weight.tensor.index_select(axis, torch.from_numpy(picked)).double()
    numbers = draw_normal(Place("w", weight.shape, 3, ()), 2, torch.empty(weight.size, dtype=torch.float64))
    drawn = (numbers.view(weight.shape) * gone.std(correction=0) + gone.mean()).float()
    expected = weight.tensor.clone().index_copy_(
        axis, torch.from_numpy(picked), drawn.index_select(axis, torch.from_numpy(picked))
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    cut = cut_columns(Redrawn(weight, axis, redraw, "w"), 4)[1]  # whose rounds go over other spans
    assert torch.equal(evaluate(cut, slab=slab), found[:, 100:200])

"""The methods of inner products: closed forms, and what the formulas leave open."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods.entry import as_arrays, make_deltas
from methods.harness import Mill, Task, fill_settings, make_values
from oracles import gram
from torch import Tensor

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.tensors.slabs import BLOCK


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def make_task(method: str, *inputs: Tensor | list[float], based: bool = False, **given: Any) -> Task:
    """Return the merge of the base, where there is one first, and the models; numbers are float64."""
    tensors = tuple(x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in inputs)
    named = {key.removesuffix("_"): value for key, value in given.items()}
    models = len(tensors) - (based or get_method(method).base == "required")
    return Task(method, tensors, fill_settings(get_method(method), named, models), optional_base=based)


def close(values: Any) -> Any:
    return pytest.approx(values, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (
            "nuslerp",
            {"weight": (None, True), "nuslerp_flatten": (True, False), "nuslerp_row_wise": (False, False)},
        ),
        ("multislerp", {"weight": (None, True), "normalize_weights": (True, False), "eps": (1e-8, False)}),
        ("karcher", {"max_iter": (10, False), "tol": (1e-5, False)}),
        ("model_stock", {"filter_wise": (False, False)}),
        (
            "geometric_median",
            {"weight": (1.0, True), "max_iter": (100, False), "tol": (1e-6, False), "lambda": (1.0, False)},
        ),
    ],
)
def test_the_parameters_of_the_specification(method: str, wanted: dict[str, Any]) -> None:
    assert {p.name: (p.default, p.per_model) for p in get_method(method).parameters} == wanted


# ---------------------------------------------------------------------------------------------- one, none, many
@pytest.mark.parametrize(("method", "given"), [("multislerp", {"weight": (0.0,)}), ("karcher", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_model_is_returned_as_it_is(mill: Mill, method: str, given: dict[str, Any], dtype: torch.dtype) -> None:
    (model,) = make_values((50, 60), dtype=dtype, count=1)
    assert torch.equal(mill.merge(make_task(method, model, **given)), model.float())


def test_one_task_vector_is_its_own_median(mill: Mill) -> None:
    base, model = make_values((50, 60), dtype=torch.float64, count=2)
    assert torch.allclose(mill.merge(make_task("geometric_median", base, model)), model, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["multislerp", "nuslerp"])
def test_equal_models_with_a_base_give_that_model(mill: Mill, method: str) -> None:
    base, model = make_values((50, 60), dtype=torch.float64, count=2)
    result = mill.merge(make_task(method, base, model, model, based=True, weight=(0.7, 0.2)))
    assert torch.allclose(result, model, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("multislerp", {"weight": (1.0, 2.0, 3.0)}),
        ("model_stock", {}),
        ("model_stock", {"filter_wise": True}),
        ("geometric_median", {}),
    ],
)
def test_models_equal_to_the_base_give_the_base(mill: Mill, method: str, given: dict[str, Any]) -> None:
    (base,) = make_values((50, 60), count=1)
    result = mill.merge(make_task(method, *[base] * 4, based=get_method(method).base == "optional", **given))
    assert torch.equal(result, base)


def test_a_tiny_input_beside_a_huge_one_overflows_nothing(mill: Mill) -> None:
    huge, tiny = torch.tensor([1e33, -1e33]), torch.tensor([1e-44, 3e-44])
    for method, given in (("multislerp", {"weight": (1.0, 1.0)}), ("karcher", {"tol": 0.0})):
        task = make_task(method, huge, tiny, **given)
        result = mill.merge(task)
        assert torch.isfinite(result).all()
        oracle = getattr(gram, method)(as_arrays(task), **task.settings)
        assert result.tolist() == pytest.approx(oracle.tolist(), rel=1e-5)


# -------------------------------------------------------------------------------------------------- on the arc
@pytest.mark.parametrize(
    "given", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
)
def test_nuslerp_of_a_right_angle_goes_round(mill: Mill, given: dict[str, Any]) -> None:
    result = mill.merge(make_task("nuslerp", [2.0, 0.0], [0.0, 3.0], weight=(3.0, 1.0), **given))
    assert result.tolist() == close([2 * math.sin(3 * math.pi / 8), 3 * math.sin(math.pi / 8)])


def test_nuslerp_is_slerp_of_flattened_tensors(mill: Mill) -> None:
    a, b = make_values((70, 80), dtype=torch.float64, count=2)
    slerp = mill.merge(make_task("slerp", a, b, t=0.3))
    assert torch.allclose(mill.merge(make_task("nuslerp", a, b, weight=(7.0, 3.0))), slerp, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(30, 40), (5, 6, 7), (90,), (1, 50), (50, 1), ()], ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_nuslerp_takes_an_angle_for_each_row_or_column(mill: Mill, shape: tuple[int, ...], columns: bool) -> None:
    """Rows run along the last axis, columns along the first; a vector is one of either."""
    a, b = make_values(shape, dtype=torch.float64, count=2)
    given = {"weight": (0.6, 0.4), "nuslerp_flatten": False, "nuslerp_row_wise": columns}
    result = mill.merge(make_task("nuslerp", a, b, **given))
    if not shape:
        assert float(result) == close(float(0.6 * a + 0.4 * b))
        return
    axis = 0 if columns else len(shape) - 1
    lines = (x.movedim(axis, -1).reshape(-1, shape[axis]) for x in (a, b))
    pairs = ([line.clone(memory_format=torch.contiguous_format) for line in pair] for pair in zip(*lines, strict=True))
    each = [mill.merge(make_task("nuslerp", *pair, weight=(0.6, 0.4))) for pair in pairs]
    others = [size for i, size in enumerate(shape) if i != axis]
    assert torch.allclose(result, torch.stack(each).view(*others, -1).movedim(-1, axis), rtol=0, atol=1e-13)


def test_nuslerp_is_straight_where_parallel_or_opposite(mill: Mill) -> None:
    for factor in (3.0, -3.0):
        rows = make_task("nuslerp", [1.0, 2.0], [factor, 2 * factor], weight=(0.75, 0.25), nuslerp_flatten=False)
        flat = make_task("nuslerp", [1.0, 2.0], [factor, 2 * factor], weight=(0.75, 0.25))
        for task in (rows, flat):
            assert mill.merge(task).tolist() == close([0.75 + 0.25 * factor, 1.5 + 0.5 * factor])


def test_nuslerp_meets_halfway_where_weights_cancel(mill: Mill) -> None:
    result = mill.merge(make_task("nuslerp", [2.0, 0.0], [0.0, 2.0], weight=(1.0, -1.0)))
    assert result.tolist() == close([math.sqrt(2)] * 2)


def test_nuslerp_of_nothing_and_something_has_a_right_angle(mill: Mill) -> None:
    for given in ({}, {"nuslerp_flatten": False}):
        result = mill.merge(make_task("nuslerp", [0.0, 0.0], [3.0, 4.0], weight=(1.0, 1.0), **given))
        assert result.tolist() == close([3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])


@pytest.mark.parametrize("given", [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_rows_are_turned_the_same_however_they_are_cut(mill: Mill, given: dict[str, Any]) -> None:
    expression = mill.express(make_task("nuslerp", *make_values((700, 500), count=2), weight=(0.7, 0.4), **given))
    results = [mill.run(expression, parts=parts, slab=slab) for parts, slab in ((1, 4 * BLOCK), (3, BLOCK), (6, 1))]
    assert all(torch.equal(result, results[0]) for result in results)


def test_multislerp_of_two_is_slerp_at_half_where_equally_long(mill: Mill) -> None:
    a, b = [3.0, 4.0, 0.0], [0.0, -3.0, 4.0]
    slerp = mill.merge(make_task("slerp", a, b, t=0.5))
    result = mill.merge(make_task("multislerp", a, b, weight=(1.0, 1.0)))
    assert result.tolist() == pytest.approx(slerp.tolist(), rel=1e-8)


def test_multislerp_keeps_the_mean_length(mill: Mill) -> None:
    values, weights = make_values((40, 50), dtype=torch.float64, count=3), (1.0, 2.0, 3.0)
    result = mill.merge(make_task("multislerp", *values, weight=weights))
    mean = sum(w * float(x.norm()) for w, x in zip(weights, values, strict=True)) / 6
    assert float(result.norm()) == pytest.approx(mean, rel=1e-8)


def test_multislerp_of_two_opposites_is_straight(mill: Mill) -> None:
    result = mill.merge(make_task("multislerp", [1.0, 2.0], [-1.0, -2.0], weight=(1.0, 1.0)))
    assert result.tolist() == close([0.0, 0.0])
    based = mill.merge(make_task("multislerp", [5.0, 5.0], [6.0, 7.0], [3.0, 1.0], based=True, weight=(2.0, 2.0)))
    assert based.tolist() == close([4.5, 4.0])


def test_multislerp_of_more_that_cancel_is_an_error(mill: Mill) -> None:
    task = make_task("multislerp", [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], weight=(1.0, 1.0, 1.0))
    with pytest.raises(MergeError, match=r"up_proj.weight: the weighted directions of its 3 inputs cancel"):
        mill.merge(task)


def test_weights_that_cannot_be_normalised_are_refused() -> None:
    check = get_method("multislerp").check
    assert check is not None
    assert "sum to zero" in str(check(weight=(1.0, -1.0), normalize_weights=True))
    assert check(weight=(1.0, -1.0), normalize_weights=False) is None
    assert check(weight=(0.0,), normalize_weights=True) is None


# ------------------------------------------------------------------------------------------------ Karcher mean
def test_the_karcher_mean_of_two_is_halfway_on_the_arc(mill: Mill) -> None:
    a, b = [3.0, 4.0, 0.0], [0.0, 0.0, 10.0]
    result = mill.merge(make_task("karcher", a, b, max_iter=100, tol=1e-12))
    middle = np.array([0.6, 0.8, 1.0]) / math.sqrt(2)
    assert result.tolist() == close((7.5 * middle).tolist())


def test_at_the_karcher_mean_the_tangents_cancel(mill: Mill) -> None:
    """The gradient of the sum of squared angles vanishes there."""
    stream = np.random.default_rng(4)
    units = [x / np.linalg.norm(x) for x in stream.standard_normal((5, 12)) + 1]
    result = mill.merge(make_task("karcher", *map(torch.from_numpy, units), max_iter=200, tol=1e-13)).numpy()
    assert np.linalg.norm(result) == close(1.0)
    angles = [math.acos(float(u @ result)) for u in units]
    assert min(angles) > 0.3
    tangents = [a / math.sin(a) * (u - math.cos(a) * result) for a, u in zip(angles, units, strict=True)]
    assert np.linalg.norm(np.sum(tangents, axis=0)) < 1e-11


def test_an_input_without_a_length_has_no_direction_but_counts(mill: Mill) -> None:
    result = mill.merge(make_task("karcher", [3.0, 4.0], [0.0, 0.0]))
    assert result.tolist() == close([1.5, 2.0])
    assert mill.merge(make_task("karcher", [0.0, 0.0], [0.0, 0.0])).tolist() == [0, 0]


def test_opposite_directions_have_the_first_as_their_karcher_mean(mill: Mill) -> None:
    assert mill.merge(make_task("karcher", [3.0, 4.0], [-6.0, -8.0])).tolist() == close([4.5, 6.0])
    for factor in (0.1, 0.7, 1.9, 3.3):
        (model,) = make_values((7, 9), dtype=torch.float64, count=1)
        result = mill.merge(make_task("karcher", model, -factor * model))
        assert torch.allclose(result, (1 + factor) / 2 * model, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------- Model Stock
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_goes_as_far_as_the_cosine_says(mill: Mill, count: int) -> None:
    """Task vectors of one length and one angle: t = N·cos / (1 + (N-1)·cos); paper, eq. 2 for two."""
    common, cosine = 2.0, 0.64
    deltas = np.full((count, count + 1), 0.0)
    deltas[:, 0] = common * math.sqrt(cosine)
    deltas[:, 1:] += common * math.sqrt(1 - cosine) * np.eye(count)
    base = np.linspace(-1, 1, count + 1)
    result = mill.merge(make_task("model_stock", *map(torch.from_numpy, (base, *(base + deltas)))))
    share = count * cosine / (1 + (count - 1) * cosine)
    assert result.tolist() == close((base + share * deltas.mean(0)).tolist())


def test_model_stock_of_right_angles_is_the_base(mill: Mill) -> None:
    assert mill.merge(make_task("model_stock", [1.0, 1.0], [2.0, 1.0], [1.0, 3.0])).tolist() == [1, 1]


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_stays_at_the_base_where_models_are_opposite(mill: Mill, filter_wise: bool) -> None:
    result = mill.merge(make_task("model_stock", [1.0, 1.0], [3.0, 4.0], [-3.0, -5.0], filter_wise=filter_wise))
    assert result.tolist() == [1, 1]


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_counts_a_product_of_norms_under_a_millionth_as_one(mill: Mill, filter_wise: bool) -> None:
    tiny = [2e-4, 0.0]
    result = mill.merge(make_task("model_stock", [0.0, 0.0], tiny, tiny, filter_wise=filter_wise))
    assert result.tolist() == close([2e-4 * 2 * 0.04 / 1.04, 0.0])


@pytest.mark.parametrize("shape", [(30, 40), (5, 6, 7), (90,), (1, 50), (50, 1)], ids=str)
def test_model_stock_of_filters_is_model_stock_of_each_row(mill: Mill, shape: tuple[int, ...]) -> None:
    values = make_values(shape, dtype=torch.float64, count=4)
    result = mill.merge(make_task("model_stock", *values, filter_wise=True))
    rows = zip(*(x.view(-1, shape[-1]) for x in values), strict=True)
    each = [mill.merge(make_task("model_stock", *row)) for row in rows]
    assert torch.allclose(result, torch.stack(each).view(shape), rtol=0, atol=1e-13)


# -------------------------------------------------------------------------------------------- geometric median
def test_the_median_of_a_square_is_its_centre(mill: Mill) -> None:
    corners = ([1.0, 1.0], [1.0, 3.0], [3.0, 3.0], [3.0, 1.0])
    assert mill.merge(make_task("geometric_median", [0.0, 0.0], *corners)).tolist() == close([2.0, 2.0])
    half = mill.merge(make_task("geometric_median", [0.0, 0.0], *corners, lambda_=0.5))
    assert half.tolist() == close([1.0, 1.0])


def test_the_median_is_the_fermat_point_of_a_triangle(mill: Mill) -> None:
    """From the Fermat point of a triangle each side is seen under 120°."""
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    task = make_task("geometric_median", [0.0, 0.0], *corners.tolist(), max_iter=1000, tol=1e-13)
    rays = [(c - y) / np.linalg.norm(c - y) for y in [mill.merge(task).numpy()] for c in corners]
    assert [float(rays[i] @ rays[i - 1]) for i in range(3)] == pytest.approx([-0.5] * 3, abs=1e-9)


def test_at_the_median_the_weighted_directions_cancel(mill: Mill) -> None:
    """The gradient of the summed distance vanishes."""
    values, weights = make_values((30, 40), dtype=torch.float64, count=4), (1.0, 1.2, 0.7)
    task = make_task("geometric_median", *values, weight=weights, max_iter=1000, tol=1e-13)
    median = (mill.merge(task) - values[0]).numpy()
    pulls = [w * (d - median) / np.linalg.norm(d - median) for w, d in zip(weights, make_deltas(task), strict=True)]
    assert np.linalg.norm(np.sum(pulls, axis=0)) < 1e-10


def test_the_median_stays_at_an_input_that_outweighs_the_others(mill: Mill) -> None:
    points = ([1.0, 0.0], [0.0, 5.0], [-3.0, 0.0])
    result = mill.merge(make_task("geometric_median", [0.0, 0.0], *points, weight=(3.0, 1.0, 1.0), max_iter=500))
    assert result.tolist() == pytest.approx(points[0], abs=1e-5)


def test_the_median_leaves_an_input_that_it_begins_at(mill: Mill) -> None:
    """The mean of the five is the first of them, which is not their median: Weiszfeld's own step would divide by 0."""
    points = ([0.0, 0.0], [-1.0, 0.1], [-1.0, -0.1], [-1.0, 0.0], [3.0, 0.0])
    task = make_task("geometric_median", [0.0, 0.0], *points, max_iter=10_000, tol=1e-12)
    result = mill.merge(task).numpy()

    def summed(y: Any) -> float:
        return sum(float(np.linalg.norm(np.array(p) - y)) for p in points)

    assert summed(result) < summed(np.zeros(2)) - 0.5
    stream = np.random.default_rng(1)
    assert all(summed(result) <= summed(result + 0.01 * stream.standard_normal(2)) for _ in range(100))
    once = mill.merge(make_task("geometric_median", [0.0, 0.0], *points, max_iter=1)).tolist()
    # Three pull with 1/1.005, 1/1.005 and 1, one with 1/3: of their mean, the share that the point's own 1 leaves.
    pulls = [1 / math.hypot(*p) for p in points[1:]]
    target = np.sum([w * np.array(p) for w, p in zip(pulls, points[1:], strict=True)], axis=0) / sum(pulls)
    share = 1 - 1 / (sum(pulls) * np.linalg.norm(target))
    assert once == close((share * target).tolist())


def test_an_outlier_moves_the_median_but_a_little(mill: Mill) -> None:
    inliers = ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    near, far = (mill.merge(make_task("geometric_median", [0.0, 0.0], *inliers, [x, x])).numpy() for x in (1e2, 1e6))
    assert np.linalg.norm(near - far) < 1e-2


def test_weights_of_nothing_are_refused() -> None:
    check = get_method("geometric_median").check
    assert check is not None
    assert check(weight=(0.0, 0.0)) == "the weights are all zero; at least one must not be"
    assert check(weight=(0.0, 1.0)) is None

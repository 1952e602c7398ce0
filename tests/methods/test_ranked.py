"""What is known beforehand of the methods that rank elements: closed forms, small cases by hand, other methods."""

from collections.abc import Sequence
from math import exp, floor, log, sqrt, tanh
from typing import Any

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, bits_of, fill_settings, make_values
from methods.suite import find_entry, make_task
from torch import Tensor

from mergemill.engine.errors import PlanError
from mergemill.engine.methods import arcee_fusion
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.drop import refuse_epsilon
from mergemill.engine.plan.settings import Site, resolve_settings
from mergemill.engine.recipe.values import Parameters
from mergemill.engine.tensors import native
from mergemill.engine.tensors.slabs import BLOCK

ROWS = ("della", "della_linear", "arcee_fusion")


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def merge(mill: Mill, name: str, inputs: Sequence[Tensor], **given: Any) -> Tensor:
    """Merge `inputs`, the base first; `lambda_` is lambda."""
    method = get_method(name)
    settings = {{"lambda_": "lambda"}.get(key, key): value for key, value in given.items()}
    models = len(inputs) - (method.base == "required")
    return mill.merge(Task(name, tuple(inputs), fill_settings(method, settings, models)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("breadcrumbs", "weight density=1.0 gamma=0.01 normalize=False rescale=False lambda=1.0"),
        ("breadcrumbs_ties", "weight density=1.0 gamma=0.01 normalize=False rescale=False lambda=1.0"),
        ("sce", "select_topk=1.0"),
        ("della", "weight density=1.0 epsilon=0.15 normalize=True rescale=True lambda=1.0"),
        ("della_linear", "weight density=1.0 epsilon=0.15 normalize=False rescale=True lambda=1.0"),
        ("arcee_fusion", ""),
        ("pcb", "ratio=0.1 lambda=1.2"),
    ],
)
def test_the_parameters_of_the_specification(name: str, parameters: str) -> None:
    found = [p.name if p.required else f"{p.name}={p.default}" for p in get_method(name).parameters]
    assert " ".join(found) == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "given"), [("arcee_fusion", {}), ("sce", {"select_topk": 0.5}), ("pcb", {})])
def test_what_is_derived_and_no_number_is_ranked(
    name: str, given: dict[str, Any], dtype: torch.dtype, mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one infinity, and of finite values whose difference is none: the machine gives what comes of it a sign."""
    large = torch.finfo(dtype).max
    base, other = (torch.full((8, 300), value, dtype=dtype) for value in (large, -large))
    third = make_values((8, 300), dtype=dtype, count=1)[0]
    hurt = third.clone()
    hurt[3, 5] = torch.inf
    inputs = [[base, other], [third, hurt]] if name == "arcee_fusion" else [[base, other, third], [third, hurt, base]]
    natively = [merge(mill, name, models, **given) for models in inputs]
    monkeypatch.setattr(native, "load", lambda: None)
    for models, result in zip(inputs, natively, strict=True):
        assert torch.equal(result.nan_to_num(7.0), merge(mill, name, models, **given).nan_to_num(7.0))
    if name == "arcee_fusion":
        assert natively[1].isfinite().all(1).tolist() == [row != 3 for row in range(8)]


# ----------------------------------------------------------------------------------------------- breadcrumbs
def test_breadcrumbs_drops_the_largest_and_keeps_those_that_follow(mill: Mill) -> None:
    base, model = torch.zeros(10), torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    result = merge(mill, "breadcrumbs", (base, model), weight=(1.0,), density=(0.5,), gamma=(0.2,))
    assert result.tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]


def test_breadcrumbs_drops_fewer_outliers_where_the_density_leaves_no_room(mill: Mill) -> None:
    base, model = torch.zeros(10), torch.arange(1.0, 11.0)
    result = merge(mill, "breadcrumbs", (base, model), weight=(1.0,), density=(0.9,), gamma=(0.3,))
    assert result.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_breadcrumbs_keeps_exactly_as_many_as_asked_where_all_are_equal(mill: Mill) -> None:
    size = 2 * BLOCK + 100
    result = merge(
        mill, "breadcrumbs", (torch.zeros(size), torch.ones(size)), weight=(1.0,), density=(0.3,), gamma=(0.25,)
    )
    outliers, kept = floor(0.25 * size), floor(0.3 * size)
    assert (result[:outliers] == 0).all(), "the first by index are the larger ones"
    assert (result[outliers : outliers + kept] == 1).all()
    assert (result[outliers + kept :] == 0).all()


@pytest.mark.parametrize(("ours", "other"), [("breadcrumbs_ties", "ties")])
def test_without_outliers_breadcrumbs_are_trimmed_as_by_ties(mill: Mill, ours: str, other: str) -> None:
    values = make_values((200, 300))
    given = {"weight": (1.0, 0.5, 0.2), "density": (0.5, 0.3, 0.1), "normalize": True, "rescale": True}
    without = merge(mill, ours, values, gamma=(0.0, 0.0, 0.0), **given)
    assert bits_of(without) == bits_of(merge(mill, other, values, **given))


# ------------------------------------------------------------------------------------------------------- sce
def test_sce_by_hand(mill: Mill) -> None:
    base = torch.full((4,), 10.0)
    first, second = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, 0.0])
    # Variances 1, 0, 2.25, 0: of the two that differ one half is kept, the third element. Squares 4 and 1.
    half = merge(mill, "sce", (base, base + first, base + second), select_topk=0.5)
    assert half.tolist() == [10, 10, 12, 10]
    # All: squares 14 and 3; where the signs agree, the mean by these.
    whole = merge(mill, "sce", (base, base + first, base + second))
    assert whole.tolist() == pytest.approx([10 + (14 * 3 + 3 * 1) / 17, 11, 12, 10])


def test_sce_of_one_model_is_that_model_and_nothing_of_it_differs(mill: Mill) -> None:
    base, model, *_ = make_values((50, 60))
    assert (merge(mill, "sce", (base, model)) - model).abs().max() < 1e-6
    assert torch.equal(merge(mill, "sce", (base, model), select_topk=0.9), base)


def test_sce_weighs_small_task_vectors_alike(mill: Mill) -> None:
    base = torch.zeros(4)
    for size, expected in ((1e-4, 1.5), (1.0, (1 + 4 * 2) / 5)):
        result = merge(mill, "sce", (base, base + size, base + 2 * size))
        assert (result / size).tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize(("far", "expected"), [(100.0, 1.0), (1e4, 0.01)])
def test_sce_takes_a_share_under_a_millionth_as_that(mill: Mill, far: float, expected: float) -> None:
    base = torch.zeros(2)
    result = merge(mill, "sce", (base, torch.tensor([far, 0.0]), torch.tensor([0.0, 1.0])))
    assert result.tolist() == pytest.approx([far, expected], rel=1e-4)


def test_sce_selects_as_many_as_asked_of_those_that_differ(mill: Mill) -> None:
    size = BLOCK + 1000
    base = torch.zeros(size)
    second = torch.ones(size)
    second[: size // 2] = 2.0
    result = merge(mill, "sce", (base, torch.ones(size), second), select_topk=0.5)
    differing = size // 2
    assert torch.equal(result != 0, torch.arange(size) < floor(0.5 * differing))


# ----------------------------------------------------------------------------------------------------- della
@pytest.mark.parametrize(("ours", "other"), [("della", "dare_ties"), ("della_linear", "dare_linear")])
def test_without_epsilon_della_is_dare(mill: Mill, ours: str, other: str) -> None:
    values = make_values((300, 400))
    given = {"weight": (1.0, 0.5, 0.2), "density": (0.5, 0.3, 0.9), "normalize": True, "rescale": True}
    without = merge(mill, ours, values, epsilon=(0.0, 0.0, 0.0), **given)
    assert bits_of(without) == bits_of(merge(mill, other, values, **given))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_each_rank_stays_as_often_as_its_probability_says(mill: Mill, kind: torch.dtype) -> None:
    rows, columns, density, epsilon = 20_000, 11, 0.6, 0.3
    stream = np.random.default_rng(3)
    ranks = stream.permuted(np.tile(np.arange(columns), (rows, 1)), axis=1)
    signs = stream.choice([-1.0, 1.0], ranks.shape)
    model = torch.from_numpy(signs * (1.0 + ranks)).to(kind)
    given = {"weight": (1.0,), "density": (density,), "epsilon": (epsilon,), "rescale": False}
    kept = merge(mill, "della_linear", (torch.zeros(rows, columns, dtype=kind), model), **given).numpy() != 0
    for rank in range(columns):
        probability = density - epsilon + 2 * epsilon * rank / (columns - 1)
        share = kept[ranks == rank].mean()
        assert abs(share - probability) < 4.5 * sqrt(probability * (1 - probability) / rows), rank
    assert abs(kept.mean() - density) < 4.5 * 0.5 / sqrt(kept.size)


def test_equal_magnitudes_rank_by_index(mill: Mill) -> None:
    rows, columns = 30_000, 5
    given = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.4,), "rescale": False}
    model = torch.ones(rows, columns)
    model[:, ::2] = -1
    shares = (merge(mill, "della_linear", (torch.zeros(rows, columns), model), **given) != 0).double().mean(0)
    assert shares.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.015)


@pytest.mark.parametrize(
    ("density", "epsilon", "refused"),
    [(0.9, 0.1, True), (0.1, 0.15, True), (0.5, -0.6, True), (0.5, 0.49, False), (1.0, 0.15, False), (0.0, 0.1, False)],
)
def test_an_epsilon_that_leaves_the_range_is_refused(density: float, epsilon: float, refused: bool) -> None:
    assert bool(refuse_epsilon((0.5, density), (0.1, epsilon))) == refused


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_the_plan_says_which_epsilon_is_too_large(name: str) -> None:
    site = Site("x", 0.0, (Parameters({"weight": 1.0, "density": 0.9}),))
    models = [("a", "x", Parameters({"density": 0.5})), ("b", "x", Parameters())]
    with pytest.raises(PlanError, match=r"tensor x: density 0\.9 ± epsilon 0\.15 must lie between 0 and 1"):
        resolve_settings(get_method(name), site, models, where="r.yml")


# ---------------------------------------------------------------------------------------------- whole rows
@pytest.mark.parametrize("shape", [(700, 301), (3, 70_001), (5, 2, 40_000), (200_000, 1)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_length_give_the_same_bits_however_they_are_cut(
    mill: Mill, name: str, shape: Sequence[int]
) -> None:
    task = make_task(name, make_values(shape))
    expression = mill.express(task)
    whole = mill.run(expression)
    expected = find_entry(name).oracle(task)
    wrong = np.abs(whole.double().numpy() - expected.values) > 2e-6 * np.abs(expected.values).max()
    assert not (wrong & ~expected.doubtful).any()
    for cut in ({"slab": BLOCK}, {"slab": 3 * BLOCK, "parts": 2}, {"parts": 4, "slab": BLOCK}):
        assert bits_of(mill.run(expression, **cut)) == bits_of(whole)


# ---------------------------------------------------------------------------------------------- arcee_fusion
def test_fusion_by_hand(mill: Mill) -> None:
    base = torch.zeros(2, 4)
    other = torch.tensor([[log(2.0), 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    # The first row's divergence is its own number; the second's is 0, as a constant changes no softmax. So is the
    # importance of all but one element, and with it the threshold: every element reaches that.
    assert torch.equal(merge(mill, "arcee_fusion", (base, other)), other)
    # One row: |D| decides. Ascending |D| 1 2 3 4 5 6 7 8 20: quartiles 3, 5, 7, threshold 5 + 1.5 · 4 = 11.
    delta = torch.tensor([5.0, 1, 20, 2, 8, 3, 7, 4, 6]) / 16
    result = merge(mill, "arcee_fusion", (torch.zeros(9), delta))
    assert result.tolist() == [0, 0, 20 / 16, 0, 0, 0, 0, 0, 0]


def test_rows_of_many_are_computed_anew_to_the_same_bits(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("arcee_fusion", make_values((900, 300)))
    kept = mill.merge(task, parts=3)
    monkeypatch.setattr(arcee_fusion, "_KEPT_ROWS", 0)
    assert bits_of(mill.merge(task, parts=2)) == bits_of(kept)


# ------------------------------------------------------------------------------------------------------- pcb
def test_pcb_of_one_model_is_that_model_where_it_competes(mill: Mill) -> None:
    base, model, *_ = make_values((100, 300))
    result = merge(mill, "pcb", (base, model), ratio=0.2, lambda_=1.0)
    delta = (model - base).flatten()
    # Alone, a score grows with |D|. The smallest of those kept has the share 0.
    order = delta.abs().argsort(descending=True)[: floor(0.2 * len(delta))]
    expected = torch.zeros_like(delta)
    expected[order[:-1]] = delta[order[:-1]]
    assert torch.allclose(result.flatten(), base.flatten() + expected, rtol=0, atol=1e-6)


def test_pcb_by_hand(mill: Mill) -> None:
    first, second = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0.0, 2.0, -1.0, 0.5])
    result = merge(mill, "pcb", (torch.zeros(4), first, second), ratio=0.5, lambda_=2.0)
    scores = [
        [exp(2 * (abs(x) / 2) ** 2) * tanh(x * (x + y)) for x, y in zip(mine, yours, strict=True)]
        for mine, yours in ((first.tolist(), second.tolist()), (second.tolist(), first.tolist()))
    ]
    # The first model's best are its third and second element, the second's its second and first (or fourth: below 0).
    assert sorted(range(4), key=scores[0].__getitem__)[2:] == [1, 2]
    assert sorted(range(4), key=scores[1].__getitem__)[2:] == [0, 1]
    # The lower of two has the share 0, the higher 1: the second element is the second model's alone.
    assert result.tolist() == pytest.approx([0, 2 * 2.0, 2 * 2.0, 0], abs=1e-6)


def test_pcb_of_equal_scores_takes_them_all_alike(mill: Mill) -> None:
    base = torch.zeros(100)
    result = merge(mill, "pcb", (base, base + 1, base + 1), ratio=0.1, lambda_=1.0)
    assert result.tolist() == [1.0] * 10 + [0.0] * 90

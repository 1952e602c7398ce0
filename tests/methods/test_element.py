"""The element-wise methods in cases worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from methods.harness import Mill, Task, fill_settings, make_values
from oracles import element
from torch import Tensor

from mergemill.engine.methods.catalogue import get_method


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mill"))


def merge(mill: Mill, method: str, *inputs: Tensor | list[float], **given: Any) -> Tensor:
    """Return the merge of the base, first, and the models."""
    tensors = tuple(torch.as_tensor(values, dtype=torch.float32) for values in inputs)
    named = {key.removesuffix("_"): value for key, value in given.items()}
    return mill.merge(Task(method, tensors, fill_settings(get_method(method), named, len(tensors) - 1)))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("expo", {"weight": (None, True)}),
        ("magmax", {"lambda": (0.5, False)}),
        ("nearswap", {"t": (None, False)}),
        ("emr", {"lambda": (1.0, False)}),
        ("negmerge", {"lambda": (1.0, False)}),
        (
            "cabs",
            {"weight": (1.0, True), "n": (64, False), "m": (256, False), "lambda": (1.0, False)},
        ),
        ("widen", {"ratio": (1.0, False), "calibration": (1.0, False)}),
        ("localize_stitch", {"density": (0.05, True), "lambda": (1.0, False)}),
        ("ram", {"epsilon": (1e-5, False)}),
        ("ramplus_tl", {"epsilon": (1e-5, False), "r": (0.1, False), "alpha": (0.2, False)}),
        (
            "consensus_ta",
            {"weight": (None, True), "lambda_mask": (0.4, True), "k": (2, False), "lambda": (1.0, False)},
        ),
        (
            "consensus_ties",
            {
                "weight": (None, True),
                "density": (1.0, True),
                "lambda_mask": (0.4, True),
                "k": (2, False),
                "normalize": (True, False),
                "rescale": (False, False),
                "lambda": (1.0, False),
            },
        ),
    ],
)
def test_the_parameters_of_the_specification(method: str, wanted: dict[str, Any]) -> None:
    assert {p.name: (p.default, p.per_model) for p in get_method(method).parameters} == wanted


def test_expo_extrapolates_beyond_the_model(mill: Mill) -> None:
    """ExPO, eq. 1: θ + alpha·(θ − θ_0) is the weight 1 + alpha on the task vector."""
    base, model = make_values((1000,), dtype=torch.float64, count=2)
    settings = fill_settings(get_method("expo"), {"weight": (1.3,)}, 1)
    result = mill.merge(Task("expo", (base, model), settings))
    assert torch.allclose(result, model + 0.3 * (model - base), rtol=0, atol=1e-14)


def test_magmax_takes_the_largest_and_of_equals_the_later(mill: Mill) -> None:
    result = merge(mill, "magmax", [0, 0, 0, 1], [3, -1, 0, 5], [-2, 1, 0, -3], [2, 1, 0, 5], lambda_=1.0)
    assert result.tolist() == [3, 1, 0, 5]
    turned = merge(mill, "magmax", [0, 0, 0, 1], [2, 1, 0, 5], [-2, 1, 0, -3], [3, -1, 0, 5], lambda_=1.0)
    assert turned.tolist() == [3, -1, 0, 5]


def test_magmax_of_one_model_goes_half_the_way(mill: Mill) -> None:
    assert merge(mill, "magmax", [1, 2], [3, -4]).tolist() == [2, -1]


def test_nearswap_moves_no_element_by_more_than_t(mill: Mill) -> None:
    base, model = make_values((5000,), count=2)
    result, delta = merge(mill, "nearswap", base, model, t=0.05), model - base
    near = delta.abs() <= 0.05
    assert 100 < int(near.sum()) < 4900
    assert torch.allclose(result, base + delta.clamp(-0.05, 0.05), rtol=0, atol=1e-6)
    assert torch.allclose(result[near], model[near], rtol=1e-6)


def test_nearswap_counts_a_difference_under_a_millionth_as_a_millionth(mill: Mill) -> None:
    result = merge(mill, "nearswap", [0, 0], [5e-7, -2e-6], t=5e-7)
    assert result.tolist() == pytest.approx([2.5e-7, -5e-7], rel=1e-6)


def test_ram_averages_over_those_that_change_an_element(mill: Mill) -> None:
    base, models = [1, 1, 1, 1], ([4, 4, 1, 1.5], [7, 1, 1, 1.25], [10, 1, 0, 1])
    assert merge(mill, "ram", base, *models).tolist() == [7, 4, 0, 1.375]
    assert merge(mill, "ram", base, *models, epsilon=0.5).tolist() == [7, 4, 0, 1]


def test_ramplus_amplifies_what_one_model_alone_changes(mill: Mill) -> None:
    # The first shares one element and has two alone, the second shares one and has none alone.
    models = ([1, 1, 2, 0], [3, 0, 0, 0])
    assert merge(mill, "ramplus_tl", [0] * 4, *models, r=1.0, alpha=9.0).tolist() == [2, 1.5, 3, 0]
    assert merge(mill, "ramplus_tl", [0] * 4, *models, r=1.0, alpha=0.25).tolist() == [2, 1.25, 2.5, 0]
    assert torch.equal(merge(mill, "ramplus_tl", [0] * 4, *models, r=0.0), merge(mill, "ram", [0] * 4, *models))


def test_consensus_keeps_what_enough_models_find_their_own(mill: Mill) -> None:
    # D = 4, 2, 3, 0; |D_1| >= 0.4 |D - D_1| holds in 1, 2, 4; of D_2 in 1, 3, 4.
    models, ones = ([2, 2, 0, 1], [2, 0, 3, -1]), (1.0, 1.0)
    by_votes = {k: merge(mill, "consensus_ta", [0] * 4, *models, weight=ones, k=k).tolist() for k in range(4)}
    assert by_votes == {0: [4, 2, 3, 0], 1: [4, 2, 3, 0], 2: [4, 0, 0, 0], 3: [0, 0, 0, 0]}


def test_the_factor_of_a_consensus_mask_is_its_model_s(mill: Mill) -> None:
    # D_1 = 1 of D = 3: kept where 1 >= factor * 2.
    for factor, kept in ((0.5, 3), (0.51, 0)):
        result = merge(mill, "consensus_ta", [0], [1], [2], weight=(1.0, 1.0), lambda_mask=(factor, 0.0))
        assert result.tolist() == [kept]


def test_lambda_of_a_consensus_comes_after_the_masks(mill: Mill) -> None:
    models = ([2, 0.5, 0], [2, 3, 3])
    plain, scaled = (merge(mill, "consensus_ta", [0, 0, 0], *models, weight=(1.0, 1.0), lambda_=x) for x in (1.0, 0.5))
    assert plain.tolist() == [4, 0, 0]
    assert scaled.tolist() == [2, 0, 0]


def test_consensus_of_one_vote_without_masks_is_the_plain_merge(mill: Mill) -> None:
    values = make_values((70, 90), count=3)
    weight, density = (0.7, 0.4), (0.5, 0.2)
    linear = merge(mill, "task_arithmetic", *values, weight=weight, lambda_=0.7)
    assert torch.equal(merge(mill, "consensus_ta", *values, weight=weight, k=0, lambda_=0.7), linear)
    ties = merge(mill, "ties", *values, weight=weight, density=density, lambda_=0.7)
    assert torch.equal(merge(mill, "consensus_ties", *values, weight=weight, density=density, k=0, lambda_=0.7), ties)


def test_consensus_masks_look_at_the_untrimmed_deltas(mill: Mill) -> None:
    # The second model's 1 is trimmed away, and yet its mask says that 1 >= 0.4 · |2 - 1|.
    result = merge(
        mill, "consensus_ties", [0, 0], [2, 0], [1, 3], weight=(1.0, 1.0), density=(1.0, 0.5), lambda_mask=(0.4, 0.4)
    )
    assert result.tolist() == [2, 0]


def test_emr_takes_the_largest_of_the_elected_sign(mill: Mill) -> None:
    models = [1.0, 4.0, -4.0, 1.0, 0.0], [2.0, -3.0, 3.0, -1.0, 0.0], [-1.0, -3.0, 3.0, 0.0, 0.0]
    assert merge(mill, "emr", [0.0] * 5, *models).tolist() == [2.0, -3.0, 3.0, 0.0, 0.0]
    assert merge(mill, "emr", [0.0] * 5, *models, lambda_=0.5).tolist() == [1.0, -1.5, 1.5, 0.0, 0.0]


def test_negmerge_takes_away_what_all_agree_on(mill: Mill) -> None:
    models = [1.0, -1.0, 1.0, 0.0, 2.0], [3.0, -2.0, -1.0, 1.0, 4.0]
    assert merge(mill, "negmerge", [0.0] * 5, *models).tolist() == [-2.0, 1.5, 0.0, 0.0, -3.0]
    assert merge(mill, "negmerge", [0.0] * 5, *models, lambda_=0.5).tolist() == [-1.0, 0.75, 0.0, 0.0, -1.5]


def test_localize_and_stitch_averages_where_masks_meet(mill: Mill) -> None:
    models = [9.0, 8.0, 1.0, 1.0], [7.0, 1.0, -8.0, 1.0]
    assert merge(mill, "localize_stitch", [0.0] * 4, *models, density=(0.5, 0.5)).tolist() == [8.0, 8.0, -8.0, 0.0]
    few = merge(mill, "localize_stitch", [0.0] * 4, *models)
    assert few.tolist() == [9.0, 0.0, -8.0, 0.0], "one element at least"


def test_cabs_gives_no_element_to_two_models(mill: Mill) -> None:
    models = [9.0, 1.0, 2.0, 8.0, 5.0], [7.0, 3.0, 2.0, 6.0, -4.0]
    settings = {"n": 1, "m": 2, "weight": (1.0, 10.0)}
    assert merge(mill, "cabs", [0.0] * 5, *models, **settings).tolist() == [9.0, 30.0, 20.0, 8.0, 0.0]
    assert merge(mill, "cabs", [0.0] * 5, *models[::-1], **settings).tolist() == [7.0, 10.0, 20.0, 6.0, 0.0]


def test_cabs_leaves_the_places_of_zeros_to_others(mill: Mill) -> None:
    models = [0.0, 0.0, 3.0, 3.0], [1.0, 2.0, 5.0, 6.0]
    assert merge(mill, "cabs", [0.0] * 4, *models, n=1, m=2).tolist() == [0.0, 2.0, 3.0, 6.0]


def test_cabs_keeps_no_more_than_there_is() -> None:
    check = get_method("cabs").check
    assert check is not None
    assert check(n=3, m=2) == "n is 3, and m only 2: no more can be kept than there is"
    assert check(n=2, m=2) is None


def test_widen_weighs_columns_by_their_rank(mill: Mill) -> None:
    """Of two models the first changes only the first column, the second both; a row of one number cannot turn."""
    result = merge(mill, "widen", [[3.0, 3.0]], [[4.0, 3.0]], [[4.0, 5.0]]).tolist()
    first, second = 0.5 * (1 + 0.5), 0.5 * (1 / (1 + np.exp(0.5)) + 0.5)  # above the mean rank, and under it
    assert result[0] == pytest.approx([3.0 + first * 1.0 + second * 1.0, 3.0 + 2.0])


def test_widen_judges_embeddings_by_rows(mill: Mill) -> None:
    values = make_values((40, 60), count=4, seed=3)
    name, settings = "model.embed_tokens.weight", fill_settings(get_method("widen"), {}, 3)
    result = mill.merge(Task("widen", tuple(values), settings, name))
    base, *others = (value.double().numpy() for value in values)
    wanted = element.widen(base, [other - base for other in others], by_token=True)
    assert np.abs(result.double().numpy() - wanted).max() < 1e-6

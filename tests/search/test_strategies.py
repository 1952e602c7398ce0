"""Strategies alone: what they ask for, and what they make of what they are told."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mergemill.engine.recipe.searches import Variable
from mergemill.engine.recipe.templates import Values
from mergemill.engine.search.cocktail import find_weights
from mergemill.engine.search.front import SumItem, find_front
from mergemill.engine.search.space import Space
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.strategies.cma import ask_cma
from mergemill.engine.search.strategies.drawn import ask_grid, ask_random, ask_sobol
from mergemill.engine.search.strategies.line import ask_line
from mergemill.engine.search.strategies.nsga2 import ask_nsga2
from mergemill.engine.search.strategies.soup import ask_soup
from mergemill.engine.search.strategies.tpe import ask_tpe
from mergemill.engine.search.trials import SCORED, Trial

BOX = Space({"x": Variable(low=-1, high=1, start=0.25), "y": Variable(low=0.01, high=1, log=True)})


def follow(asking: Asking, score: Callable[[Values], float], most: int = 2000) -> tuple[list[Values], str]:
    """Return all that a strategy asks for, and why it ends."""
    asked: list[Values] = []
    generation = next(asking)
    while len(asked) < most:
        asked += generation
        try:
            generation = asking.send([score(values) for values in generation])
        except StopIteration as end:
            return asked, str(end.value)
    return asked, ""


def bowl(values: Values) -> float:
    return (float(str(values["x"])) + 0.6) ** 2 + (math.log10(float(str(values["y"]))) + 1) ** 2


def test_cma_begins_with_the_start_and_finds_the_minimum() -> None:
    asked, why = follow(ask_cma(BOX, 0, None, None), bowl)
    assert asked[0] == {"x": 0.25, "y": 0.1}
    assert why == "sigma"
    assert bowl(asked[-1]) < 1e-4
    assert all(-1 <= values["x"] <= 1 and 0.01 <= values["y"] <= 1 for values in asked)  # type: ignore[operator]


def test_cma_draws_the_same_of_the_same_seed_and_other_points_of_another() -> None:
    first, again, other = (follow(ask_cma(BOX, seed, 6, 0.2), bowl, 30)[0] for seed in (3, 3, 4))
    assert first == again
    assert first[1:] != other[1:]


def test_cma_takes_whole_numbers_and_what_failed_ranks_last() -> None:
    space = Space({"n": Variable(low=0, high=7, integer=True), "x": Variable(low=0, high=1)})
    asked, _ = follow(
        ask_cma(space, 1, None, None),
        lambda values: math.inf if values["x"] > 0.9 else (values["n"] - 5) ** 2 + values["x"],  # type: ignore[operator]
        200,
    )
    assert all(isinstance(values["n"], int) and 0 <= values["n"] <= 7 for values in asked)
    assert asked[-1]["n"] == 5


def test_above_forty_numbers_cma_learns_variances_alone() -> None:
    space = Space({"x": Variable(low=0, high=1, layers=50)})
    asked, _ = follow(ask_cma(space, 0, None, None), lambda values: float(np.sum(values["x"])), 600)  # type: ignore[arg-type]
    assert float(np.sum(asked[-1]["x"])) < 15  # type: ignore[arg-type] - of 25 at the start


def test_a_grid_has_all_combinations_the_first_variable_slowest() -> None:
    space = Space({"m": Variable(choices=["a", "b"]), "x": Variable(low=0, high=1, layers=2)})
    asked, why = follow(ask_grid(space, 2), lambda _: 0.0)
    assert why == "grid"
    assert [(values["m"], values["x"]) for values in asked] == [
        (m, (x, y)) for m in "ab" for x in (0.0, 1.0) for y in (0.0, 1.0)
    ]


@pytest.mark.parametrize("ask", [ask_random, ask_sobol])
def test_points_are_drawn_from_all_of_the_box(ask: Callable[[Space, int], Asking]) -> None:
    space = Space({"x": Variable(low=0, high=8), "m": Variable(choices=[1, 2, 3, 4])})
    asked, again = (follow(ask(space, 7), lambda _: 0.0, 64)[0] for _ in range(2))
    assert asked == again
    assert {values["m"] for values in asked} == {1, 2, 3, 4}
    spread = np.histogram([float(str(values["x"])) for values in asked], bins=8, range=(0, 8))[0]
    assert spread.min() >= (6 if ask is ask_sobol else 1)


def test_the_golden_section_finds_a_minimum_in_ten_evaluations() -> None:
    asked, why = follow(ask_line(Space({"t": Variable(low=0, high=2)})), lambda values: abs(values["t"] - 1.234))  # type: ignore[operator]
    assert (len(asked), why) == (10, "line")
    assert min(abs(values["t"] - 1.234) for values in asked) < 0.04  # type: ignore[operator]


def test_tpe_begins_with_the_start_and_finds_the_better_choice() -> None:
    space = Space({"m": Variable(choices=["a", "b", "c"]), "x": Variable(low=0, high=1, start=0.25)})
    score = lambda values: (values["x"] - 0.8) ** 2 + (values["m"] != "b")  # type: ignore[operator]  # noqa: E731
    first, again = (follow(ask_tpe(space, 3), score, 40)[0] for _ in range(2))
    assert first == again
    assert first[0]["x"] == 0.25
    best = min(first, key=score)
    assert best["m"] == "b"
    assert score(best) < 0.02


def test_nsga2_finds_the_front_of_two_objectives() -> None:
    """Of x squared and (x - 1) squared, whose front is x from 0 to 1, and a choice that makes both worse."""
    space = Space({"x": Variable(low=-4, high=4, start=3), "m": Variable(choices=["a", "b"])})

    def score(values: Values) -> tuple[float, float]:
        x, worse = float(str(values["x"])), 5.0 * (values["m"] == "b")
        return (math.inf, math.inf) if x < -3 else (x * x + worse, (x - 1) ** 2 + worse)

    first, again = (follow(ask_nsga2(space, 1, 12, 2), score, 300)[0] for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert first[0]["x"] == 3
    late = first[-60:]
    near = sum(-0.2 < float(str(values["x"])) < 1.2 and values["m"] == "a" for values in late)
    assert near > 15  # of points at random, 5 would be


def test_a_front_is_what_nothing_is_better_than_in_all() -> None:
    items = [SumItem("loss", 1), SumItem("accuracy", -1)]
    parts = [(1.0, 0.2), (2.0, 0.9), (1.5, 0.1), (2.0, 0.9), (0.9, 0.1), (3.0, 0.8)]
    trials = [Trial(i, 0, {}, "", SCORED, 0.0, parts=part) for i, part in enumerate(parts)]
    assert [trial.number for trial in find_front([*trials, Trial(6, 0, {}, "")], items)] == [4, 0, 1]
    assert find_front([Trial(0, 0, {}, "", SCORED, 0.0)], []) == []


def make_soup(scores: dict[tuple[str, ...], float], rounds: int = 1) -> tuple[list[str], list[tuple[str, ...]]]:
    kept: list[str] = []
    asked, _ = follow(ask_soup("abc", rounds, kept), lambda values: scores[values["models"]])  # type: ignore[index]
    return kept, [values["models"] for values in asked]  # type: ignore[misc]


ALONE = {("a",): 3.0, ("b",): 1.0, ("c",): 2.0}


def test_a_soup_keeps_what_makes_it_no_worse() -> None:
    kept, asked = make_soup({**ALONE, ("b", "c"): 1.0, ("b", "c", "a"): 1.5})
    assert kept == ["b", "c"]
    assert asked == [("a",), ("b",), ("c",), ("b", "c"), ("b", "c", "a")]  # 2k - 1


def test_a_soup_is_never_below_its_best_model() -> None:
    kept, asked = make_soup({**ALONE, ("b", "c"): 1.1, ("b", "a"): 1.2})
    assert kept == ["b"]
    assert len(asked) == 5


def test_a_second_round_tries_what_was_left_out() -> None:
    scores = {**ALONE, ("b", "c"): 1.1, ("b", "a"): 0.9, ("b", "a", "c"): 0.8}
    assert make_soup(scores)[0] == ["b", "a"]
    assert make_soup(scores, rounds=3)[0] == ["b", "a", "c"]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_a_cocktails_weights_are_the_formula(temperature: float) -> None:
    losses: Sequence[float] = (2.13, 1.9, 4.4)
    shares = np.exp(-np.float64(losses) / temperature)
    np.testing.assert_allclose(find_weights(losses, temperature), shares / shares.sum(), rtol=1e-12)


def test_a_cocktail_of_large_losses_is_finite() -> None:
    assert find_weights([1e6, 1e6 + 1], 0.01) == pytest.approx([1.0, 0.0])

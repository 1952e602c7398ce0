"""Soups and cocktails of tiny models: what is kept, with which weights, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from search.toys import by_model

from mergemill.engine.errors import PlanError
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.search.searches import make_candidate, read_results, run_cocktail, run_soup

NORM = "model.norm.weight"
SOUP = {"merge_method": "linear", "models": [{"model": f"./{name}"} for name in ("zero", "one", "two")]}


def read_level(out: Path) -> float:
    return float(load_file(next(out.glob("*.safetensors")))[NORM][0])


def write_soup(folder: Path) -> Path:
    path = folder / "soup.yml"
    path.write_text(json.dumps({**SOUP, "parameters": {"weight": 1.0}}))
    return path


@pytest.mark.parametrize(("level", "kept", "scores"), [(1.5, 2, 3), (0.1, 1, 3), (1.0, 2, 3)])
def test_a_greedy_soup_is_never_below_its_best_model(
    here: Path, tmp_path: Path, level: float, kept: int, scores: int
) -> None:
    made = run_soup(write_soup(tmp_path), tmp_path / "out", Objective(command=by_model(level)))
    alone = {name: abs(number - level) for number, name in enumerate(("./zero", "./one", "./two"))}
    assert list(made.order) == sorted(alone, key=lambda name: alone[name])
    assert len(made.scores) == scores
    assert abs(read_level(tmp_path / "out") - level) <= min(alone.values()) + 1e-6
    assert len(made.kept) >= kept - (level == 1.0)
    assert len(made.found.trials) <= 5
    if level == 1.5:
        again = run_soup(write_soup(tmp_path), tmp_path / "out", Objective(command=by_model(1.5)))
        assert again.found.trials == made.found.trials  # known already: nothing is judged again
        assert "merge_method: linear" in make_candidate(tmp_path / "out.search", made.found.trials[3].number)


def test_a_cocktails_weights_are_those_of_its_losses(here: Path, tmp_path: Path) -> None:
    made = run_cocktail(
        ["./zero", "./one", "./two"],
        tmp_path / "out",
        Objective(command=by_model(0.6)),
        temperature=0.5,
        target="./two",
        alpha=0.25,
    )
    assert made.losses == pytest.approx([0.6, 0.4, 1.4], abs=1e-6)
    shares = np.exp(-np.float64(made.losses) / 0.5)
    np.testing.assert_allclose(made.weights, shares / shares.sum(), rtol=1e-12)
    level = 0.25 * 2 + 0.75 * float(np.dot(made.weights, [0, 1, 2]))
    assert read_level(tmp_path / "out") == pytest.approx(level, abs=1e-6)
    assert read_results(tmp_path / "out.search")[0].values == {"models": ("./one",)}


def test_soups_and_cocktails_that_cannot_be_are_refused(here: Path, tmp_path: Path) -> None:
    objective = Objective(command=by_model(0.6))
    with pytest.raises(PlanError, match="two models or more"):
        run_soup({**SOUP, "models": [{"model": "./one"}]}, tmp_path / "out", objective)
    with pytest.raises(PlanError, match="two models or more"):
        run_cocktail(["./one"], tmp_path / "out", objective)
    with pytest.raises(PlanError, match="must be above 0"):
        run_cocktail(["./one", "./two"], tmp_path / "out", objective, temperature=0)
    with pytest.raises(PlanError, match="are written to this machine"):
        run_cocktail(["./one", "./two"], "s3://bucket/out", objective)
    assert not list(tmp_path.iterdir())

"""What a method is said to take of a worker is what plans of the same models take."""

from pathlib import Path
from typing import Any

import pytest
from models import write_llama

from mergemill.engine import estimate_cost, make_plan, run
from mergemill.engine.errors import CheckpointError, PlanError
from mergemill.engine.methods import find_methods
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.memory import stream_bytes
from mergemill.engine.recipe import parse_recipe

METHODS = tuple(find_methods())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``base``, ``a`` and ``b``, of 5 MB each, with buffers."""
    folder = tmp_path_factory.mktemp("zoo")
    sizes: dict[str, Any] = {"layers": 1, "vocab": 6000, "hidden": 192, "heads": 4, "extras": ("integer", "empty")}
    base = write_llama(folder / "base", seed=0, **sizes)
    for seed, name in enumerate("ab", start=1):
        write_llama(folder / name, seed=seed, near=base, **sizes)
    return folder


def make_recipe(method: Method, folder: Path) -> Any:
    names = ["a", "b"][: 1 if method.most_inputs == 1 or method.base == "first of two" else 2]
    recipe: dict[str, Any] = {"merge_method": method.name, "models": [{"model": str(folder / name)} for name in names]}
    recipe["parameters"] = {parameter.name: 1 for parameter in method.parameters if parameter.required}
    return parse_recipe(str(recipe | ({} if method.base == "none" else {"base_model": str(folder / "base")})))


@pytest.mark.parametrize("name", METHODS)
def test_the_least_memory_is_what_a_plan_of_such_models_needs(name: str, zoo: Path) -> None:
    method = find_methods()[name]
    plan = make_plan(make_recipe(method, zoo))
    cost = estimate_cost(method, str(zoo / "base"))
    assert cost.least_bytes == max(stream_bytes(part) for part in plan.parts)
    assert cost.models == len(plan.origin.value.get("models") or ()) + (method.base == "first of two")
    assert cost.base == (method.base in ("required", "optional"))


def test_the_least_memory_is_enough_and_a_byte_less_is_not(zoo: Path, tmp_path: Path) -> None:
    method = find_methods()["ties"]
    plan, cost = make_plan(make_recipe(method, zoo)), estimate_cost(method, str(zoo / "base"))
    with pytest.raises(PlanError, match=f"tensor {cost.least_tensor} needs {cost.least_bytes} bytes"):
        run(plan, tmp_path / "less", workers=0, threads=1, memory=cost.least_bytes - 1)
    run(plan, tmp_path / "least", workers=0, threads=1, memory=cost.least_bytes)


def test_more_models_take_more_and_longer_tensors_do_not(zoo: Path, tmp_path: Path) -> None:
    ties = find_methods()["ties"]
    two, five = (estimate_cost(ties, str(zoo / "base"), models=models) for models in (2, 5))
    assert (two.models, five.models) == (2, 5)
    assert two.stream_bytes < five.stream_bytes
    longer = write_llama(tmp_path / "longer", seed=0, layers=1, vocab=12_000, hidden=192, heads=4)
    cost = estimate_cost(ties, str(longer))
    assert cost.shape == (12_000, 192)
    assert (cost.stream_bytes, cost.least_bytes) == (two.stream_bytes, two.least_bytes)


def test_inputs_are_kept_only_where_one_part_holds_the_tensor(zoo: Path, tmp_path: Path) -> None:
    ties, linear = find_methods()["ties"], find_methods()["linear"]
    small = estimate_cost(ties, str(zoo / "base"))
    assert small.parts == 1
    assert small.keep_bytes is not None
    assert small.keep_bytes > small.stream_bytes + 3 * 6000 * 192 * 2
    assert estimate_cost(linear, str(zoo / "base")).keep_bytes is None
    wide = write_llama(tmp_path / "wide", seed=0, layers=1, vocab=30_000, hidden=192, heads=4)
    cut = estimate_cost(ties, str(wide))
    assert (cut.parts, cut.keep_bytes, cut.passes) == (3, None, ties.most_rounds + 1)


def test_a_method_on_matrices_has_the_whole_tensor_in_memory(zoo: Path) -> None:
    costs = {name: estimate_cost(find_methods()[name], str(zoo / "base")) for name in METHODS}
    assert costs["linear"].slab == "block"
    for name, cost in costs.items():
        if find_methods()[name].reads == "matrix":
            assert cost.slab == "tensor", name
            assert cost.stream_bytes > 3 * 6000 * 192 * 4


def test_more_models_than_the_method_takes_are_refused(zoo: Path) -> None:
    with pytest.raises(PlanError, match="slerp takes exactly 2 models; 3 were asked for"):
        estimate_cost(find_methods()["slerp"], str(zoo / "base"), models=3)


def test_no_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        estimate_cost(find_methods()["ties"], str(tmp_path / "nowhere"))

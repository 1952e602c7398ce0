"""Tensors of weight 0 are not read, and every byte is as if they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors
from runs.merging import SMALL_PART, hash_output, make_recipe_of, parts_of, run_until
from safetensors.torch import save_file

from mergemill.engine import make_plan, run, verify
from mergemill.engine.plan import alike
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed

WEIGHTLESS = "weight 0"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear without normalize": {"normalize": False},
    "task_arithmetic": {"lambda": -0.5},
    "expo": {},
    "ties": {"density": 0.4},
    "ties rescaled": {"density": 0.4, "rescale": True, "normalize": False},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5},
}
FIRST_LAYER = [0, 1]  # a weight over the two layers of the family: 0 before and in the first


def make_recipe(folder: Path, name: str, weights: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    method = name.partition(" ")[0]
    models = [{"model": str(folder / m), "parameters": {"weight": w}} for m, w in zip("AB", weights, strict=True)]
    base = {} if method == "linear" else {"base_model": str(folder / "base")}
    return {"merge_method": method, "models": models, "parameters": METHODS[name], **base, **more}


def plan(recipe: dict[str, Any]) -> Plan:
    with parts_of(SMALL_PART):
        return make_plan(make_recipe_of(recipe))


def merge(recipe: dict[str, Any], out: Path) -> tuple[Plan, Committed]:
    found = plan(recipe)
    return found, run(found, out, workers=0, threads=2)


def sizes(folder: Path, *, where: str = "") -> int:
    """Return the bytes of a model's tensors whose names hold `where`."""
    return sum(x.numel() * x.element_size() for name, x in read_tensors(folder).items() if where in name)


@pytest.mark.parametrize("name", METHODS)
def test_what_has_no_weight_is_not_read_and_changes_no_byte(
    name: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(family, name, (FIRST_LAYER, 0.7))
    found, done = merge(recipe, tmp_path / "out")
    second = sizes(family / "A", where="layers.1.")
    assert {source.model[-1]: source.read_bytes for source in found.sources} == {
        "A": second,
        "B": sizes(family / "B"),
        **({} if name.startswith("linear") else {"e": sizes(family / "base")}),
    }
    (first, *_) = found.sources
    layer = sum("layers.1." in each for each in read_tensors(family / "A"))
    assert (first.merged, dict(first.dropped)) == (layer, {WEIGHTLESS: first.tensors - layer})
    monkeypatch.setattr(alike, "find_weightless", lambda method, settings, steps, guard: [])
    whole, all_read = merge(recipe, tmp_path / "whole")
    assert whole.read_bytes - found.read_bytes == sizes(family / "A") - second
    assert done.read_bytes < all_read.read_bytes
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "whole")


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear"])
def test_one_of_several_without_weight_stays(
    name: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(family, name, (0, 0))
    found, _ = merge(recipe, tmp_path / "out")
    assert [source.merged > 0 for source in found.sources] == [False, True, True]
    monkeypatch.setattr(alike, "find_weightless", lambda method, settings, steps, guard: [])
    merge(recipe, tmp_path / "whole")
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "whole")


def test_without_weight_not_even_infinities_matter(own_family: Path, tmp_path: Path) -> None:
    recipe = make_recipe(own_family, "linear", (0, 1))
    recipe["dtype"] = "bfloat16"
    broken = {name: torch.full_like(x, float("inf")) for name, x in read_tensors(own_family / "A").items()}
    save_file(broken, own_family / "A" / "model.safetensors", {"format": "pt"})
    merge(recipe, tmp_path / "out")
    expected, found = read_tensors(own_family / "B"), read_tensors(tmp_path / "out")
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("task_arithmetic", {"guard": {"policy": "keep-base"}}),
        ("task_arithmetic", {"guard": {"policy": "fail"}}),
        ("task_arithmetic", {"coefficients": {"method": "metagpt"}}),
        ("task_arithmetic", {"post": [{"method": "svc"}]}),
    ],
)
def test_what_else_looks_at_them_has_them_read(name: str, more: dict[str, Any], family: Path) -> None:
    found = plan(make_recipe(family, name, (0, 1), **more))
    assert [dict(source.dropped) for source in found.sources] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("multislerp", {}),
        ("nuslerp", {}),
        ("consensus_ta", {"base_model": "base"}),
        ("consensus_ties", {"base_model": "base"}),
        ("geometric_median", {"base_model": "base"}),
    ],
)
def test_methods_that_do_not_say_so_read_all(
    method: str, more: dict[str, str], family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family)
    models = [{"model": "A", "parameters": {"weight": 0}}, {"model": "B", "parameters": {"weight": 1}}]
    found = plan({"merge_method": method, "models": models, **more})
    assert {tuple(source.dropped) for source in found.sources} == {()}


def test_a_model_that_is_a_source_twice_is_read_where_it_has_weight(family: Path) -> None:
    sources = [
        {"model": str(family / "A"), "layer_range": [0, 2], "parameters": {"weight": weight}} for weight in (0, 1)
    ]
    found = plan({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert [(source.merged, dict(source.dropped)) for source in found.sources] == [(found.tensors, {})]


def test_the_base_of_a_task_vector_without_weight_is_not_read_either(family: Path) -> None:
    models = [
        {"model": str(family / "B"), "delta_base": str(family / "base"), "parameters": {"weight": 0}},
        {"model": str(family / "B"), "parameters": {"weight": 1}},
    ]
    recipe = {"merge_method": "expo", "base_model": str(family / "A"), "models": models}
    found = plan(recipe)
    by_model = {Path(source.model).name: source for source in found.sources}
    assert dict(by_model["base"].dropped) == {WEIGHTLESS: by_model["base"].tensors}
    assert (by_model["base"].read_bytes, by_model["B"].merged) == (0, found.tensors)


def test_such_a_merge_is_resumed_and_replayed(family: Path, tmp_path: Path) -> None:
    recipe = make_recipe(family, "ties", (FIRST_LAYER, 0.7))
    run_until(plan(recipe), tmp_path / "out", 3)
    assert merge(recipe, tmp_path / "out")[1].redone_parts > 0
    with parts_of(SMALL_PART):
        assert verify(tmp_path / "out", replay=5).replayed == 5

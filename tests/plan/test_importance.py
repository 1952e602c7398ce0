"""Importances beside models: Fisher merging and RegMean against float64, streamed, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import read_arrays, read_tensors, write_llama, write_tensors
from oracles import Array
from runs.merging import SMALL_PART, parts_of

from mergemill.engine import load_recipe, make_plan, make_raw_plan, run, verify
from mergemill.engine.errors import MergeError, PlanError

HIDDEN, CHANNELS = 32, 48


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``a`` and ``b``, their squares ``a-fisher`` and ``b-fisher``, and Gram matrices ``a-gram``, …"""
    folder = tmp_path_factory.mktemp("important")
    for seed, name in enumerate("ab"):
        sizes = {"layers": 2, "hidden": HIDDEN, "heads": 2, "kv_heads": 1, "intermediate": CHANNELS}
        tensors = read_tensors(write_llama(folder / name, seed=seed, dtype="float32", **sizes))
        draw = torch.Generator().manual_seed(seed)
        squares = {key: torch.randn(each.shape, generator=draw).square() * 1e-9 for key, each in tensors.items()}
        squares["model.norm.weight"].zero_()
        write_checkpoint(folder / f"{name}-fisher", squares)
        layers = {key: each.shape[1] for key, each in tensors.items() if "_proj" in key}
        inputs = {key: torch.randn((3 * n, n), generator=draw) for key, n in layers.items()}
        inputs["model.layers.1.mlp.up_proj.weight"] = torch.randn((5, HIDDEN), generator=draw)  # of low rank
        grams = {key: x.T @ x for key, x in inputs.items()}
        grams["model.layers.0.mlp.up_proj"] = grams.pop("model.layers.0.mlp.up_proj.weight")  # under the module's name
        write_checkpoint(folder / f"{name}-gram", grams)
    return folder


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    write_tensors(folder, tensors)


@pytest.fixture(autouse=True)
def _among_them(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def make_recipe(method: str, kind: str, **parameters: Any) -> dict[str, Any]:
    entries = [
        {"model": name, "importance": {"model": f"{name}-{kind}"}, "parameters": {"weight": weight}}
        for name, weight in (("a", 0.5), ("b", 2.0))
    ]
    return {"merge_method": method, "models": entries, "parameters": parameters, "dtype": "float32"}


def read_all(models: Path, kind: str) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    return [read_arrays(models / name) for name in "ab"], [read_arrays(models / f"{name}-{kind}") for name in "ab"]


def test_every_element_weighs_as_much_as_it_matters(models: Path, tmp_path: Path) -> None:
    plan = make_plan(make_recipe("fisher", "fisher"))
    run(plan, tmp_path / "out", workers=0)
    (a, b), (f, g) = read_all(models, "fisher")
    for name, found in read_arrays(tmp_path / "out").items():
        nobody = f[name] + g[name] == 0
        left, right = np.where(nobody, 0.5, 0.5 * f[name]), np.where(nobody, 2.0, 2.0 * g[name])
        np.testing.assert_allclose(found, (left * a[name] + right * b[name]) / (left + right), rtol=2e-6, atol=1e-6)
    assert {source.path.rpartition("/")[2] for source in plan.sources} == {"a", "b", "a-fisher", "b-fisher"}
    assert (
        plan.read_bytes == sum(each.nbytes for name in ("a", "b") for each in read_tensors(models / name).values()) * 2
    )
    verify(tmp_path / "out", replay=2)


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_a_layer_s_outputs_are_nearest_to_those_of_all_models(alpha: float, models: Path, tmp_path: Path) -> None:
    run(make_plan(make_recipe("regmean", "gram", alpha=alpha)), tmp_path / "out", workers=0)
    (a, b), (f, g) = read_all(models, "gram")
    for name, found in read_arrays(tmp_path / "out").items():
        key = next((each for each in (name, name.removesuffix(".weight")) if each in f), None)
        mean = (0.5 * a[name] + 2.0 * b[name]) / 2.5
        expected = mean
        if key is not None:
            grams = [w * np.where(np.eye(len(x), dtype=bool), x, alpha * x) for w, x in ((0.5, f[key]), (2.0, g[key]))]
            ridge = 1e-6 * np.mean(np.diag(grams[0] + grams[1]))
            products = a[name] @ grams[0] + b[name] @ grams[1] + ridge * mean
            expected = np.linalg.solve(grams[0] + grams[1] + ridge * np.eye(len(grams[0])), products.T).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)


def test_slices_of_layers_and_small_parts_give_the_same_bytes(tmp_path: Path) -> None:
    whole = make_recipe("fisher", "fisher")
    sources = [{**entry, "layer_range": [0, 2]} for entry in whole["models"]]
    run(make_plan(whole), tmp_path / "whole", workers=0)
    with parts_of(SMALL_PART):
        plan = make_plan({**whole, "models": None, "slices": [{"sources": sources}]})
    run(plan, tmp_path / "sliced", workers=0, threads=2)
    one, other = (read_tensors(tmp_path / name) for name in ("whole", "sliced"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_importances_it_is_linear_and_the_plan_says_so(tmp_path: Path) -> None:
    recipe = make_recipe("regmean", "gram")
    for entry in recipe["models"]:
        del entry["importance"]
    plan = make_plan(recipe)
    assert "recipe: no model has an importance, so regmean is linear" in plan.warnings
    run(plan, tmp_path / "out", workers=0)
    run(make_plan({**recipe, "merge_method": "linear"}), tmp_path / "linear", workers=0)
    one, other = (read_tensors(tmp_path / name) for name in ("out", "linear"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dictionaries_of_tensors_have_importances_too(models: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "a.pt")
    torch.save({"w": torch.tensor([3.0, 0.0, 1.0])}, tmp_path / "b.pt")
    torch.save({"w": torch.tensor([1.0, 0.0, 2.0])}, tmp_path / "f.pt")
    torch.save({"w": torch.tensor([3.0, 1.0, 2.0])}, tmp_path / "g.pt")
    entries = [
        {"model": str(tmp_path / f"{a}.pt"), "importance": {"model": str(tmp_path / f"{f}.pt")}}
        for a, f in ("af", "bg")
    ]
    run(make_raw_plan(load_recipe({"merge_method": "fisher", "models": entries})), tmp_path / "out", workers=0)
    assert read_tensors(tmp_path / "out")["w"].tolist() == pytest.approx([2.5, 0.0, 2.0])


def test_what_does_not_fit_is_refused_by_the_plan(models: Path, tmp_path: Path) -> None:
    def refused(recipe: dict[str, Any]) -> str:
        with pytest.raises(PlanError) as caught:
            make_plan(recipe)
        return str(caught.value)

    assert "linear takes no importance; choose fisher" in refused(make_recipe("linear", "fisher"))
    one = make_recipe("fisher", "fisher")
    del one["models"][1]["importance"]
    assert "b has no importance, and other models have; give one beside every model, or none" in refused(one)
    lacking = "tensor model.embed_tokens.weight is in a but not in its importance a-gram"
    assert lacking in refused(make_recipe("fisher", "gram"))
    shapes = "importance a-fisher [256, 32] as F32; it must be floating, of shape [32, 32] (the Gram matrix"
    assert shapes in refused(make_recipe("regmean", "fisher"))


def test_an_importance_below_zero_and_a_matrix_that_is_no_gram_end_the_merge(models: Path, tmp_path: Path) -> None:
    squares, grams = read_tensors(models / "a-fisher"), read_tensors(models / "a-gram")
    squares["model.norm.weight"][3] = -1e-9
    infinite = {**squares, "model.norm.weight": squares["model.norm.weight"].abs() + torch.inf}
    write_checkpoint(tmp_path / "infinite", infinite)
    name = "model.layers.1.self_attn.q_proj.weight"
    grams[name] = grams[name].triu()
    write_checkpoint(tmp_path / "squares", squares)
    write_checkpoint(tmp_path / "grams", grams)
    for method, kind, words in (
        ("fisher", "squares", "model.norm.weight: the importance of model 1 has elements below 0 or not finite"),
        ("fisher", "infinite", "model.norm.weight: the importance of model 1 has elements below 0 or not finite"),
        ("regmean", "grams", f"{name}: the Gram matrix of model 1 is none"),
    ):
        recipe = make_recipe(method, {"grams": "gram"}.get(kind, "fisher"))
        recipe["models"][0]["importance"]["model"] = str(tmp_path / kind)
        with pytest.raises(MergeError, match=words):
            run(make_plan(json.dumps(recipe)), tmp_path / f"out-{kind}", workers=0)
        assert not (tmp_path / f"out-{kind}" / "model.safetensors.index.json").exists()

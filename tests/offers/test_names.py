"""One tensor under several names: wrappers, prefixes, spellings, and what a recipe maps."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama, write_tensors
from runs.merging import make_recipe_of

from mergemill.engine import make_plan, run
from mergemill.engine.errors import PlanError, RecipeError

Rename = Callable[[str], str]

INNER: Mapping[str, Rename] = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "peft": lambda name: f"base_model.model.{name}",
    "wrapped twice": lambda name: f"module._orig_mod.{name}",
    "vision, new": lambda name: name.replace("model.", "model.language_model."),
    "vision, old": lambda name: f"language_model.{name}",
    "transformer": lambda name: name.replace("model.", "transformer."),
    "no prefix": lambda name: name.removeprefix("model."),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_llama(tmp_path / "base", seed=1, layers=2)
    write_llama(tmp_path / "a", seed=2, layers=2, near=tmp_path / "base")
    return tmp_path


def rename(folder: Path, target: Path, change: Rename, **more: torch.Tensor) -> Path:
    shutil.copytree(folder, target)
    write_tensors(target, {change(name): tensor for name, tensor in read_tensors(folder).items()} | more)
    return target


def merge(out: Path, base: Path, *models: Path, **more: Any) -> dict[str, torch.Tensor]:
    body = {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 0.7}}
    plan = make_plan(make_recipe_of({**body, "models": [{"model": str(model)} for model in models], **more}))
    run(plan, out, workers=0)
    return read_tensors(out)


def assert_equal(made: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", INNER)
def test_the_donors_names_are_the_outputs(kind: str, models: Path, tmp_path: Path) -> None:
    expected = merge(tmp_path / "expected", models / "base", models / "a")
    other = rename(models / "a", models / "other", INNER[kind])
    made = merge(tmp_path / "out", models / "base", other)
    assert_equal(made, expected)


def test_a_base_model_gives_a_head_model_all_but_its_head(models: Path, tmp_path: Path) -> None:
    write_llama(models / "tied", seed=1, layers=2, tied=True)
    write_llama(models / "b", seed=2, layers=2, tied=True, near=models / "tied")
    expected = merge(tmp_path / "expected", models / "tied", models / "b")
    other = rename(models / "b", models / "other", INNER["no prefix"])
    made = merge(tmp_path / "out", models / "tied", other)
    assert_equal(made, expected)
    turned = merge(tmp_path / "turned", other, models / "tied")
    assert turned.keys() == read_tensors(other).keys()


def test_a_wrapped_donor_is_written_as_loaders_want_it(models: Path, tmp_path: Path) -> None:
    wrapped = rename(models / "base", models / "wrapped", INNER["wrapped twice"])
    assert merge(tmp_path / "out", wrapped, models / "a").keys() == read_tensors(models / "base").keys()


def test_other_names_are_told(models: Path) -> None:
    other = rename(models / "a", models / "other", INNER["vision, new"])
    body = {"merge_method": "linear", "base_model": str(models / "base"), "parameters": {"weight": 1}}
    plan = make_plan(make_recipe_of({**body, "models": [{"model": str(models / "base")}, {"model": str(other)}]}))
    (told,) = [warning for warning in plan.warnings if "called otherwise" in warning]
    assert "model.language_model.embed_tokens.weight is model.embed_tokens.weight" in told


def test_slices_take_layers_that_the_donor_lacks_under_its_names(models: Path, tmp_path: Path) -> None:
    write_llama(models / "deep", seed=3, layers=4)
    other = rename(models / "deep", models / "other", INNER["vision, old"])
    slices = [
        {"sources": [{"model": str(models / "base"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(other), "layer_range": [2, 4]}]},
    ]
    body = {"merge_method": "passthrough", "base_model": str(models / "base"), "slices": slices}
    run(make_plan(make_recipe_of(body)), tmp_path / "out", workers=0)
    made, deep = read_tensors(tmp_path / "out"), read_tensors(models / "deep")
    assert torch.equal(made["model.layers.3.mlp.up_proj.weight"], deep["model.layers.3.mlp.up_proj.weight"])


def test_another_types_names_are_not_guessed(models: Path) -> None:
    other = rename(models / "a", models / "other", lambda name: name.replace("model.", "roberta."))
    with pytest.raises(PlanError, match="layers"):
        merge(models / "out", models / "base", other)


def rename_blocks(name: str) -> str:
    return name.replace("model.layers.", "decoder.blocks.").replace(".self_attn.", ".attention.")


def test_a_name_map_says_what_is_not_known(models: Path, tmp_path: Path) -> None:
    expected = merge(tmp_path / "expected", models / "base", models / "a")
    other = rename(models / "a", models / "other", rename_blocks)
    rules = {"re:^decoder\\.blocks\\.(\\d+)": "model.layers.\\1", ".attention.": ".self_attn."}
    made = merge(tmp_path / "out", models / "base", other, name_map=rules)
    assert_equal(made, expected)
    assert json.loads((tmp_path / "out" / "recipe.yml").read_text())["name_map"] == rules


def test_a_name_map_that_maps_nothing_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match=r"name_map: 'blocks\.' is in no name"):
        merge(models / "out", models / "base", models / "a", name_map={"blocks.": "layers."})


def test_a_name_map_gives_no_two_tensors_one_name(models: Path) -> None:
    other = rename(models / "a", models / "other", lambda name: name.replace("gate_", "one_").replace("up_", "two_"))
    with pytest.raises(PlanError, match="each tensor needs a name of its own"):
        merge(models / "out", models / "base", other, name_map={"one_": "up_", "two_": "up_"})


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"re:(": "x"}, "'re:(' with 'x' is no substitution"),
        ({"re:a": "\\1"}, "invalid group reference"),
        ({"a": 1}, "'a' must be text"),
        (["a"], "'name_map' must be a mapping"),
    ],
)
def test_what_is_no_name_map_is_refused(rules: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        make_recipe_of({"merge_method": "linear", "models": [{"model": "a"}], "name_map": rules})


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2, whose weights are Conv1D, a fine-tune, and this with linear layers, as a conversion leaves it."""
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
    layer = {f"h.0.{name}.weight": shape for name, shape in shapes.items()}
    layer |= {f"h.0.{name}.bias": shape[1:] for name, shape in shapes.items()}
    layer |= {f"{name}.{kind}": (8,) for name in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")}
    layer |= {"wte.weight": (20, 8), "wpe.weight": (16, 8)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 2}
    for seed, folder in enumerate(("base", "conv1d", "linear")):
        stream = torch.Generator().manual_seed(min(seed, 1))
        tensors = {f"transformer.{name}": torch.randn(shape, generator=stream) for name, shape in layer.items()}
        if folder == "linear":
            tensors |= {n: t.T.contiguous() for n, t in tensors.items() if ".c_" in n and t.ndim == 2}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20, "n_positions": 16}))
        write_tensors(tmp_path / folder, tensors)
    return tmp_path


@pytest.mark.parametrize("method", [{"merge_method": "linear"}, {"merge_method": "ties"}])
def test_weights_that_a_model_stores_transposed_are_turned_where_the_recipe_says_so(
    method: dict[str, Any], gpt2: Path, tmp_path: Path
) -> None:
    """Attention's output is square here, so that no shape tells."""
    settings = {**method, "parameters": {"weight": 0.7, "density": 0.4}}
    expected = merge(tmp_path / "expected", gpt2 / "base", gpt2 / "conv1d", **settings)
    rule = {"model": str(gpt2 / "linear"), "filter": "re:\\.c_(attn|proj|fc)\\."}
    made = merge(tmp_path / "out", gpt2 / "base", gpt2 / "linear", **settings, transposed=[rule])
    assert_equal(made, expected)


def test_a_rule_of_transposed_that_means_nothing_is_refused_and_a_shape_names_the_rule(gpt2: Path) -> None:
    other = gpt2 / "linear"
    with pytest.raises(PlanError, match=r"\[24, 8\].* \[8, 24\]; .*say so: 'transposed: \[\{model: .*linear, filter"):
        merge(gpt2 / "out", gpt2 / "base", other)
    for rule, message in (
        ({"model": str(other), "filter": "q_proj"}, "transposed: the filter 'q_proj' matches no matrix of .*linear; "),
        ({"model": str(gpt2 / "base"), "filter": "c_attn"}, "transposed: .*base is the donor, whose layout the output"),
        (
            {"model": str(other)},
            r"tensor .*transposed: \[.* or give the rule that turns it by mistake a narrower filter",
        ),
        ({"model": "elsewhere"}, "transposed: elsewhere is none of the recipe's models, which are"),
    ):
        with pytest.raises(PlanError, match=message):
            merge(gpt2 / "out", gpt2 / "base", other, transposed=[rule])

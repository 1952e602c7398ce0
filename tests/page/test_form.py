"""The form and the YAML are views of one value; faults are at their lines."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import read_tensors
from page.conftest import Ask
from safetensors.torch import save_file

from mergemill.cli.page.form import ModelLine, NoForm, RecipeForm, parse_form, read_form, write_form
from mergemill.engine import read_recipe

TEXT = """\
# mine
merge_method: ties
base_model: models/base  # the first
models:
  - {model: models/a, parameters: {weight: 0.6, density: [0, 0.5, 1]}, delta_base: models/b}
  - model: models/b
    parameters:
      weight: [{filter: mlp, value: 1}, {value: 0.5}]
guard: {policy: warn}
dtype: bfloat16
"""

names = st.text("abcdefg./-_ ", min_size=1, max_size=8).map(str.strip).filter(lambda text: text[:1].isalpha())
scalars = st.one_of(
    st.integers(-9, 9), st.booleans(), st.floats(-4, 4), st.sampled_from(["union", "1e-5", "yes", "a: b", "#"])
)
values = st.one_of(
    scalars, st.lists(scalars, max_size=3), st.lists(st.fixed_dictionaries({"value": scalars}), max_size=2)
)
parameters = st.dictionaries(st.sampled_from(["weight", "density", "t"]), values, min_size=1, max_size=2)
entries = st.fixed_dictionaries({"model": names}, optional={"parameters": parameters, "delta_base": names})
recipes = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "linear"]), "models": st.lists(entries, min_size=1, max_size=3)},
    optional={"base_model": names, "dtype": st.just("float16"), "parameters": parameters, "slug": scalars},
)


@settings(max_examples=40)
@given(recipes)
def test_what_the_form_shows_and_gives_back_is_the_same_recipe(recipe: dict[str, object]) -> None:
    text = yaml.safe_dump(recipe)
    form = read_form(text)
    assert write_form(text, form) == text
    assert read_form(write_form("", replace(form, others=()))).models == tuple(
        replace(row, place=i) for i, row in enumerate(form.models)
    )
    assert parse_form({**asdict(form)}) == replace(form, others=())
    changed = write_form(text, replace(form, dtype="float32"))
    assert read_recipe(changed)[0].data == {**read_recipe(text)[0].data, "dtype": "float32"}


def test_an_edit_keeps_what_the_form_does_not_know() -> None:
    form = read_form(TEXT)
    assert form.others == ("guard",)
    assert form.models[0].parameters == {"weight": "0.6", "density": "[0, 0.5, 1]"}
    first = replace(form.models[0], parameters={"weight": "0.7", "density": ""})
    written = write_form(TEXT, replace(form, models=(form.models[1], first, ModelLine("models/c", {}))))
    assert written.startswith("# mine\n")
    assert yaml.safe_load(written) == {
        "merge_method": "ties",
        "base_model": "models/base",
        "models": [
            {"model": "models/b", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}},
            {"model": "models/a", "parameters": {"weight": 0.7}, "delta_base": "models/b"},
            {"model": "models/c"},
        ],
        "guard": {"policy": "warn"},
        "dtype": "bfloat16",
    }


def test_an_empty_text_is_an_empty_form_and_back() -> None:
    assert read_form("\n") == RecipeForm(parameters={})
    assert write_form("# mine\n", RecipeForm(merge_method="linear")) == "# mine\nmerge_method: linear\n"
    assert write_form("merge_method: linear\n", RecipeForm()) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "cannot be read"),
        ("- a", "no mapping"),
        ("slices: []", "stacks layers"),
        ("experts: []", "mixture"),
        ("a: 1\n---\nb: 2", "stages"),
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
        ("models: 5", "models is written otherwise"),
        ("a: 1\na: 2", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("a: 1" + " " * (64 << 10), "too long"),
    ],
)
def test_a_text_that_is_no_form_says_why(text: str, why: str) -> None:
    with pytest.raises(NoForm, match=why):
        read_form(text)


def test_faults_are_at_their_lines(ask: Ask) -> None:
    text = TEXT.replace("density", "densty").replace("weight: [", "wieght: [")
    error = ask("POST", "/api/look", json={"text": text}).json()["error"]
    assert [
        (fault["line"], text.splitlines()[fault["line"] - 1][fault["column"] :][: fault["width"]])
        for fault in error["faults"]
    ] == [
        (5, "densty"),
        (8, "wieght"),
    ]
    for wrong, line in (("\na: ]\n", 2), ("dtype: 5\nx: 1\n", 2)):
        faults = ask("POST", "/api/look", json={"text": wrong}).json()["error"]["faults"]
        assert faults[0]["line"] == line


def test_a_model_that_is_not_there_is_marked_where_it_is_written(ask: Ask) -> None:
    text = TEXT.replace("model: models/b\n", "model: models/nowhere\n")
    (fault,) = ask("POST", "/api/look", json={"text": text}).json()["error"]["faults"]
    assert (fault["line"], fault["width"]) == (6, len("models/nowhere"))


def test_a_look_has_form_and_plan_of_one_text(ask: Ask) -> None:
    told = ask("POST", "/api/look", json={"text": TEXT, "memory": "512MiB", "out": "merged"}).json()
    facts = dict(told["plan"]["facts"])
    assert told["form"]["merge_method"] == facts["method"] == "ties"
    assert facts["memory"].endswith("512.0 MiB promised to each worker")
    assert facts["dtype"] == "BF16, as dtype says"
    assert [source["model"] for source in told["plan"]["sources"]] == ["models/a", "models/b", "models/base"]
    written = ask("POST", "/api/write", json={"text": TEXT, "form": {**told["form"], "dtype": "float32"}}).json()
    assert "dtype: float32" in written["text"]


def test_the_shelf_has_the_models_below_the_root_and_what_headers_say_of_them(ask: Ask) -> None:
    found = {each["path"]: each["kind"] for each in ask("GET", "/api/models").json()}
    assert {"models/a": "model", "models/b": "model", "models/base": "model"}.items() <= found.items()
    facts = dict(ask("GET", "/api/facts", params={"model": "models/a"}).json())
    assert (facts["model"], facts["layers"]) == ("llama", "2 (model.layers)")


def test_help_has_formula_and_ranges(ask: Ask) -> None:
    methods = {each["name"]: each for each in ask("GET", "/api/start").json()["methods"]}
    assert methods["task_arithmetic"]["formula"] == "Return base + lambda · sum(weight[i] · deltas[i])."
    density = next(each for each in methods["ties"]["parameters"] if each["name"] == "density")
    assert (density["default"], density["range"], density["per_model"]) == ("1.0", "from 0 to 1", True)


STAGES = "name: s\n{0}: [{{model: models/a}}]\n---\n{0}: [{{model: s}}]".format("merge_method: passthrough\nmodels")
MIXED = "base_model: models/base\ngate_mode: random\nexperts: [{source_model: models/a}, {source_model: models/b}]"
BEYOND = {
    "slices: [{sources: [{model: models/a, layer_range: [0, 2]}]}]\nmerge_method: passthrough": "it stacks layers",
    STAGES: "it has stages, which are several documents",
    MIXED: "it is a mixture of experts",
    "adapters: [{adapter: models/lora, parameters: {weight: 0.5}}]\nmerge_method: linear": "it joins adapters",
}


@pytest.mark.parametrize("text", BEYOND)
def test_what_the_form_does_not_show_is_planned_and_run_from_the_yaml(ask: Ask, root: Path, text: str) -> None:
    write_lora(root / "models" / "lora")
    told = ask("POST", "/api/look", json={"text": text, "memory": "512MiB"}).json()
    assert told["error"] is None
    assert BEYOND[text] in told["why_no_form"]
    assert told["plan"]["sources"]
    if text.startswith("adapters"):
        name = ask("POST", "/api/merge", json={"text": text, "out": "joined"}).json()["id"]
        while (run := ask("GET", "/api/run", params={"id": name}).json())["live"]:
            time.sleep(0.1)
        assert run["state"] == "finished", run["log"]
        assert "import AutoPeftModel" in ask("GET", "/api/result", params={"id": name}).json()["uses"][0]["text"]


def write_lora(folder: Path) -> None:
    """Write an adapter of one module, of rank 2, as peft does."""
    folder.mkdir(exist_ok=True)
    start = "base_model.model.model.layers.0.mlp.up_proj"
    rows, columns = read_tensors(folder.parent / "a")["model.layers.0.mlp.up_proj.weight"].shape
    factors = {f"{start}.lora_A.weight": torch.ones(2, columns), f"{start}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/base"}))


def test_a_folder_of_others_is_refused_when_it_is_named_and_at_the_start(ask: Ask, root: Path) -> None:
    (root / "mine").mkdir(exist_ok=True)
    (root / "mine" / "thesis.tex").write_text("mine")
    for out, why in (("mine", "holds 'thesis.tex'"), ("mine/thesis.tex/out", "is a file")):
        given = {"text": TEXT, "out": out, "memory": "512MiB"}
        told = ask("POST", "/api/look", json=given).json()
        assert told["plan"]
        assert why in told["option_error"]
        answer = ask("POST", "/api/merge", json=given)
        assert answer.status_code == 400
        assert why in answer.json()["message"]
    refused = ask("POST", "/api/merge", json={"text": TEXT, "out": " "})
    assert (refused.status_code, refused.json()["message"][:16]) == (400, "name the output:")
    assert not any("mine" in run["out"] for run in ask("GET", "/api/runs").json())

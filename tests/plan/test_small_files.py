"""The small files of the output: what loaders and the Hub read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import write_llama
from plan.sketches import config, llama, make_recipe, plan_of, read_file, read_json, write_sketch

from mergemill.engine import load_recipe, make_plan
from mergemill.engine.recipe import Recipe, parse_recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *, layers: int = 3, tied: bool = False, **more: Any) -> None:
    write_sketch(Path(name), llama(layers=layers, tied=tied), config=config(layers=layers, tied=tied, **more))


def linear(*models: str, **more: Any) -> dict[str, Any]:
    listed = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": listed, "parameters": {"weight": 1}, **more}


def stack(*parts: tuple[str, int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": model, "layer_range": [first, last]}]} for model, first, last in parts]
    return {"merge_method": "passthrough", "slices": slices}


# ----------------------------------------------------------------------------------------------------- config
def test_a_config_that_nothing_changes_is_copied_byte_for_byte() -> None:
    write("a")
    write("b", hidden_act="other")
    assert read_file(plan_of(linear("a", "b")), "config.json") == Path("a/config.json").read_bytes()


def test_the_base_is_the_donor_else_the_first_model() -> None:
    write("a")
    write("b", hidden_act="other")
    assert read_json(plan_of(linear("a", "b", base_model="b")), "config.json")["hidden_act"] == "other"
    assert read_json(plan_of(linear("b", "a")), "config.json")["hidden_act"] == "other"


def changed(recipe: dict[str, Any], donor: str) -> dict[str, Any]:
    """Return the keys of the config that the merge changes, with their new values."""
    before, after = (
        json.loads(Path(donor, "config.json").read_text()),
        read_json(plan_of(recipe), "config.json"),
    )
    assert list(after)[: len(before)] == list(before)
    return {key: after[key] for key in after if before.get(key) != after[key]}


def test_the_layer_count_and_lists_with_an_entry_a_layer_follow_the_slices() -> None:
    write("a", layer_types=["x", "y", "z"])
    assert changed(stack(("a", 0, 2), ("a", 1, 3)), "a") == {
        "num_hidden_layers": 4,
        "layer_types": ["x", "y", "y", "z"],
    }


def test_the_dtype_is_the_one_that_is_written() -> None:
    write("a")
    write("b")
    assert changed(linear("a", "b", dtype="float32", out_dtype="float16"), "a") == {"dtype": "float16"}
    assert changed(linear("a", "b", dtype="bfloat16"), "a") == {}


def test_of_several_dtypes_the_config_names_that_of_most_bytes() -> None:
    norms = {name: ("F32", shape) for name, (_, shape) in llama().items() if "norm" in name}
    write_sketch(Path("a"), llama() | norms, config=config())
    assert changed(linear("a"), "a") == {}
    write_sketch(Path("b"), llama(dtype="F32") | dict.fromkeys(norms, ("BF16", (8,))), config=config())
    assert changed(linear("b"), "b") == {"dtype": "float32"}


def test_an_old_config_keeps_the_old_name_of_its_dtype() -> None:
    kept = {key: value for key, value in config().items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    write_sketch(Path("a"), llama(), config=kept)
    assert changed(linear("a", dtype="float32"), "a") == {"torch_dtype": "float32"}


def test_a_head_that_is_written_for_a_tied_donor_unties_its_config() -> None:
    write("tied", tied=True)
    write("untied")
    assert changed(linear("tied", "untied"), "tied") == {"tie_word_embeddings": False}
    assert changed(linear("untied", "tied"), "untied") == {}
    assert changed(linear("tied"), "tied") == {}


def test_a_tied_donor_that_stores_its_embedding_twice_is_untied_by_an_untied_model_alone() -> None:
    for name in ("twice", "twice-too"):
        write_sketch(Path(name), llama(), config=config(tied=True))
    write("untied")
    assert changed(linear("twice", "untied"), "twice") == {"tie_word_embeddings": False}
    assert changed(linear("twice", "twice-too"), "twice") == {}


def test_without_a_config_none_is_written() -> None:
    write_sketch(Path("a"), llama())
    assert "config.json" not in [file.name for file in plan_of(linear("a")).files]


# ---------------------------------------------------------------------------------------------- index, copies
def test_the_index_is_last_and_names_every_tensor_sorted() -> None:
    write("a")
    plan = plan_of(linear("a"), shard_size=1000)
    assert plan.files[-1].name == "model.safetensors.index.json"
    index = read_json(plan, "model.safetensors.index.json")
    assert list(index["weight_map"]) == sorted(llama())
    assert index["weight_map"] == {name: shard.name for shard in plan.shards for name in shard.tensors}
    size = sum(len(shard.header) for shard in plan.shards)
    assert index["metadata"]["total_size"] == plan.write_bytes - size
    assert index["metadata"]["total_parameters"] == index["metadata"]["total_size"] // 2


def test_tokenizer_files_of_the_donor_are_copied_byte_for_byte() -> None:
    for name in ("a", "b"):
        write_llama(Path(name), seed=1, layers=1)
        Path(name, "chat_template.jinja").write_text(f"{{# {name} #}}\r\n")
        Path(name, "training_args.bin").write_bytes(b"\0")
    plan = plan_of(linear("a", "b", base_model="b"))
    copied = [file.name for file in plan.files if file.copied]
    assert copied == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(read_file(plan, name) == Path("b", name).read_bytes() for name in copied)


def test_the_recipe_is_written_as_the_user_wrote_it() -> None:
    write("a")
    text = "# ours\r\nmerge_method:   passthrough\nmodels: [{model: a}] # é\n"
    Path("r.yml").write_bytes(text.encode())
    assert read_file(make_plan(load_recipe("r.yml")), "recipe.yml") == text.encode()


def test_a_recipe_made_in_python_is_written_so_that_it_reads_as_itself() -> None:
    write("a")
    recipe = Recipe.model_validate(linear("a"))
    assert parse_recipe(read_file(make_plan(recipe), "recipe.yml").decode()) == recipe


# ------------------------------------------------------------------------------------------------------- card
def read_card(plan: Any) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of the card."""
    _, front, text = read_file(plan, "README.md").decode().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_has_the_front_matter_of_a_merge() -> None:
    write_llama(Path("a"), seed=1, layers=1)
    write_llama(Path("b"), seed=2, layers=1)
    plan = make_plan(make_recipe(linear("a", "b")))
    front, text = read_card(plan)
    assert front == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergemill"],
        "license": "apache-2.0",
    }
    assert plan.origin.text in text
    assert "arXiv:2203.05482" in text


def test_local_folders_are_no_names_of_the_hub() -> None:
    write("models/a")
    write("models/b")
    front, text = read_card(plan_of(linear("models/a", "models/b")))
    assert "base_model" not in front
    assert "`models/a`" in text
    assert "huggingface.co/models/a" not in text


def test_licences_that_differ_give_none() -> None:
    write_llama(Path("a"), seed=1, layers=1)
    write_llama(Path("b"), seed=2, layers=1)
    Path("b/README.md").write_text("---\nlicense: mit\n---\n")
    assert "license" not in read_card(plan_of(linear("a", "b")))[0]

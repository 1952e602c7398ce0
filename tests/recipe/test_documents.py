"""YAML as it is read: anchors, merge keys, names, files."""

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import document, load_recipe, parse_recipe

ANCHORS = """\
merge_method: ties
models:
  - model: a
    parameters: &first {weight: 1, density: 0.5}
  - model: b
    parameters:
      weight: 2
      <<: *first
  - model: c
    parameters: *first
  - model: d
    parameters:
      <<: [{gamma: 1}, {gamma: 2, weight: 3}, *first]
"""


def test_anchors_and_merge_keys_work():
    read = [dict(entry.parameters) for entry in parse_recipe(ANCHORS).models]
    assert read == [
        {"weight": 1, "density": 0.5},
        {"weight": 2, "density": 0.5},
        {"weight": 1, "density": 0.5},
        {"weight": 3, "density": 0.5, "gamma": 1},
    ]


def test_a_fault_in_a_merged_key_is_where_it_is_written():
    bad = "merge_method: m\nmodels:\n- &a\n  model: a\n  wieght: 1\n- <<: *a\n  model: b\n"
    with pytest.raises(RecipeError, match=r"^recipe.yml:5: unknown key 'wieght'; .* \(and 1 more\)$"):
        parse_recipe(bad)


def test_keys_are_text():
    tokens = "tokenizer: {tokens: {no: {force: true}, 42: {force: true}}}\n"
    recipe = parse_recipe("merge_method: m\nmodels: [{model: a}]\n" + tokens)
    assert list(recipe.tokenizer.tokens) == ["no", "42"]


def test_surrogate_pairs_of_json_are_one_character():
    recipe = parse_recipe(r'{"merge_method": "\ud83d\ude00", "models": [{"model": "a"}]}')
    assert recipe.merge_method == "😀"


def test_load_recipe_names_the_path(tmp_path):
    path = tmp_path / "my.yml"
    path.write_text("merge_method: m\r\nmodels: [{model: a}]\r\n", newline="")
    recipe = load_recipe(path)
    assert recipe.name == str(path)
    assert recipe.text == "merge_method: m\r\nmodels: [{model: a}]\r\n"
    path.write_text("merge_method: m\nmodel: [{model: a}]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(caught.value) == f"{path}:2: unknown key 'model'; did you mean 'models'?"


def test_a_missing_file_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yml: cannot be read: No such file or directory$"):
        load_recipe(tmp_path / "none.yml")


def test_a_file_that_is_not_utf8_names_line_and_byte(tmp_path):
    path = tmp_path / "latin.yml"
    path.write_bytes(b"merge_method: m\n# \xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yml:2: not UTF-8 text: byte 18 cannot be decoded$"):
        load_recipe(path)


def test_aliases_do_not_unfold_without_end(monkeypatch):
    monkeypatch.setattr(document, "MOST_VALUES", 1000)
    bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abc", "bcd", strict=True))
    with pytest.raises(RecipeError, match="the recipe holds more than 1000 values"):
        parse_recipe(bomb)

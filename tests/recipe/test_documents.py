"""YAML as it is read: anchors, merge keys, names, files."""

import itertools
import os

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
    assert recipe.file == str(path)
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


def test_merge_keys_do_not_unfold_without_end():
    names = "abcdefghijklmnop"
    bomb = "a: &a {k: v}\n"
    bomb += "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise(names))
    with pytest.raises(RecipeError, match="unknown key 'p'"):
        parse_recipe(bomb)


def test_keys_that_are_merged_again_and_again_are_counted(monkeypatch):
    monkeypatch.setattr(document, "MOST_VALUES", 1000)
    bomb = "a: &a {b: 1, c: 2, d: 3}\nb: {<<: [" + ", ".join(["*a"] * 500) + "]}\n"
    with pytest.raises(RecipeError, match="the recipe holds more than 1000 values"):
        parse_recipe(bomb)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!bool maybe", "'maybe' cannot be read as bool"),
        ('!!float ""', "'' cannot be read as float"),
        ('!!int ""', "'' cannot be read as int"),
        ("!!int x", "'x' cannot be read as int"),
        (":".join(["1"] * 300), None),
        ("!!float " + ":".join(["1.5"] * 300), f"'{'1.5:' * 15}…' cannot be read as float"),
        ("9" * 5000, f"'{'9' * 60}…' cannot be read as int"),
        ("!!timestamp x", "the YAML tag 'tag:yaml.org,2002:timestamp' has no meaning here"),
        ("!!binary aGk=", "the YAML tag 'tag:yaml.org,2002:binary' has no meaning here"),
        ('"\\UFFFFFFFF"', "not valid YAML: an escape or a directive has a number too large"),
        ('"\\U00110000"', "not valid YAML: an escape or a directive has a number too large"),
    ],
)
def test_an_odd_scalar_is_told_with_its_line(value, words):
    with pytest.raises(RecipeError, match=r"^recipe.yml:2: ") as caught:
        parse_recipe(f"merge_method: linear\ndtype: {value}\n")
    assert words is None or str(caught.value) == f"recipe.yml:2: {words}"


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yml")
    (tmp_path / "large.yml").write_bytes(b"#" * ((1 << 20) + 1))
    (tmp_path / "device.yml").symlink_to("/dev/zero")
    wrong = {
        "pipe": "it is a pipe, not a file",
        "device": "it is a device, not a file",
        "large": "it has more than the",
    }
    for name, words in wrong.items():
        with pytest.raises(RecipeError, match=f"{name}.yml: cannot be read: {words}"):
            load_recipe(tmp_path / f"{name}.yml")

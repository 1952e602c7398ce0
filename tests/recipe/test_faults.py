"""Every way to write a recipe wrongly, and the one line that says so."""

import doctest

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import faults, parse_recipe

MODELS = "merge_method: m\nmodels: [{model: a}]\n"  # two lines, so what follows begins at line 3
SLICE = "merge_method: m\nslices:\n- sources:\n"  # three lines
ONE_OF = "a recipe needs exactly one of models, slices, modules"
WRITTEN = "a model is written path[@revision][+lora] or as a mapping"
RANGE = "'layer_range' must be two whole numbers [from, to], for example [0, 32]"
TOP = (
    "merge_method, base_model, models, slices, modules, parameters, methods, coefficients, post, name_map, "
    "transposed, match_experts, policy, guard, dtype, out_dtype, quantize, tokenizer"
)


def say_fault(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return str(caught.value).removeprefix("recipe.yml:")


def test_unknown_key_names_the_nearest():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MODELS + "dtpye: float16\n", name="my/recipe.yml")
    assert str(caught.value) == "my/recipe.yml:3: unknown key 'dtpye'; did you mean 'dtype'?"


def test_unknown_key_without_a_near_one_names_all():
    known = f"{TOP}, chat_template, storage_options, name, stages, keep, round_stages, tokenizer_source"
    assert say_fault(MODELS + "qqq: x\n") == f"3: unknown key 'qqq'; known here: {known}"


def test_of_several_faults_the_first_by_line_is_said_and_the_others_counted():
    text = "parameters: {t: .nan, s: []}\nmodels: [{model: 3}]\nmerge_method: m\n"
    assert say_fault(text) == "1: 't' is nan; a setting must be a finite number (and 2 more)"


YAML = {
    "": "1: the recipe is empty; it needs merge_method and one of models, slices, modules",
    "# only a comment\n": "1: the recipe is empty; it needs merge_method and one of models, slices, modules",
    "# a list\n- a\n": "2: a recipe must be a mapping of keys to values, not a list",
    "hello\n": "1: a recipe must be a mapping of keys to values, not the text 'hello'",
    "merge_method: [\n": "2: not valid YAML: expected the node content, but found '<stream end>'",
    MODELS + "a: b: c\n": "3: not valid YAML: mapping values are not allowed here",
    MODELS + "\tx: 1\n": "3: not valid YAML: found character '\\t' that cannot start any token",
    MODELS + "\0": "3: not valid YAML: character 0 is not allowed",
    MODELS + "parameters: {t: *x}\n": "3: not valid YAML: found undefined alias 'x'",
    MODELS + "---\n" + MODELS: "4: this document has no name, nor has the one in line 1; only the result may have none",
    MODELS + "merge_method: n\n": "3: the key 'merge_method' is already given in line 1",
    MODELS + "parameters:\n  t: 1\n  s: 2\n  t: 3\n": "6: the key 't' is already given in line 4",
    MODELS + "[a]: 3\n": "3: a key must be text, not a list or a mapping",
    MODELS + "<<: 3\n": "3: '<<' takes a mapping, or a list of mappings",
    MODELS + "parameters: {t: !!set {a}}\n": "3: the YAML tag 'tag:yaml.org,2002:set' has no meaning here",
    MODELS + "parameters: {t: !!int x}\n": "3: 'x' cannot be read as int",
    MODELS + 'parameters: {t: "\\ud800"}\n': "3: '\\ud800' cannot be read as str",
    MODELS + "parameters: &a {t: *a}\n": "1: nested too deeply, or an anchor that contains itself",
    "[" * 5000: "1: not valid YAML: brackets are nested more than 50 deep",
    "- " * 5000: "1: nested too deeply, or an anchor that contains itself",
}
WHAT_IS_MERGED = {
    "merge_method: m\n": f"1: {ONE_OF}; none is here",
    MODELS + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n": (
        f"3: {ONE_OF}; 'slices' stands beside 'models'"
    ),
    "\nmodels: [{model: a}]\n": "2: a recipe needs the key 'merge_method'",
    "merge_method: 3\nmodels: [{model: a}]\n": ("1: 'merge_method' must be text, not the number 3; put it in quotes"),
    "merge_method:\nmodels: [{model: a}]\n": "1: 'merge_method' must be text; nothing is written here",
    "merge_method: m\nmodels: []\n": "2: 'models' is an empty list and needs at least one item",
    "merge_method: m\nmodels: {model: a}\n": "2: 'models' must be a list, not a mapping",
    "merge_method: m\nmodels:\n- a\n": (
        "3: an item of models must be a mapping with the keys model, delta_base, importance, parameters, "
        "not the text 'a'; write {model: a}"
    ),
    "merge_method: m\nmodels:\n- model: a\n  layer_range: [0, 4]\n": (
        "4: unknown key 'layer_range'; known here: model, delta_base, importance, parameters"
    ),
    "merge_method: m\nmodules: {}\n": "2: 'modules' is an empty mapping and needs at least one module",
    "merge_method: m\nmodules: []\n": "2: 'modules' must be a mapping of names to values, not a list",
    "merge_method: m\nmodules:\n  text:\n    parameters: {}\n": (
        "3: a module needs exactly one of models, slices; none is here"
    ),
    "merge_method: m\nmodules:\n  text:\n    models: []\n    slices: []\n": (
        "5: a module needs exactly one of models, slices; 'slices' stands beside 'models'"
    ),
}
SLICES = {
    SLICE + "  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 3]}\n": (
        "5: layer_range [0, 3] has 3 layers, but the slice's first source has 4"
    ),
    SLICE + "  - {model: a, layer_range: [4, 4]}\n": (
        "4: 'layer_range' is [4, 4] and must be [from, to] with 0 <= from < to"
    ),
    SLICE + "  - {model: a, layer_range: [-1, 4]}\n": (
        "4: 'layer_range' is [-1, 4] and must be [from, to] with 0 <= from < to"
    ),
    SLICE + "  - {model: a, layer_range: [1, 2, 3]}\n": f"4: {RANGE}; here are 3",
    SLICE + "  - {model: a, layer_range: 4}\n": f"4: {RANGE}, not the number 4",
    SLICE + "  - model: a\n    layer_range: [0, 4.0]\n": f"5: {RANGE}, not the number 4.0",
    SLICE + "  - model: a\n    layer_range: [no, 4]\n": f"5: {RANGE}, not the boolean false",
    SLICE + "  - model: a\n": "4: a source needs the key 'layer_range'",
    SLICE + "  - model: a\n    layer_rnage: [0, 1]\n": "5: unknown key 'layer_rnage'; did you mean 'layer_range'?",
}
SETTINGS = {
    "t: .nan": "4: 't' is nan; a setting must be a finite number",
    "t: 1e999": "4: 't' is inf; a setting must be a finite number",
    "t: 99999999999999999999": "4: 't' is a number of 67 bits; a setting must fit 64 bits",
    "t:": "4: 't' has no value",
    "'': 1": "4: '' must have a name before the colon",
    "t: []": "4: 't' is an empty list; a gradient needs at least one number",
    "t: [0, true]": ("4: 't' item 2 is the boolean true, but item 1 is the number 0; a gradient holds one sort"),
    "t:\n  - 0\n  - x": ("6: 't' item 2 is the text 'x', but item 1 is the number 0; a gradient holds one sort"),
    "t: [0, .inf]": "4: 't' item 2 is inf; a setting must be a finite number",
    "t: [0, [1]]": "4: 't' item 2 is a list; an item of a gradient must be a number, a boolean or a text",
    "t:\n  - value: 1\n  - 0.5": "6: 't' item 2 is the number 0.5 among conditions; write it as '- value: …'",
    "t:\n  - filter: mlp": "5: a condition needs the key 'value'",
    "t:\n  - filter: mlp\n    vlaue: 1": "6: unknown key 'vlaue'; did you mean 'value'?",
    "t:\n  - filter: 3\n    value: 1": "5: 'filter' must be text, not the number 3; put it in quotes",
    "t:\n  - value: 1\n    filter: 're:('": (
        "6: 'filter' is 're:(', not a valid regular expression: missing ), unterminated subpattern at position 0"
    ),
    "t:\n  - value: [{value: 3}]": ("5: 'value' must be a scalar or a gradient; a condition cannot hold another one"),
    "t:\n  - value:\n    - 1\n    - .inf": "7: 'value' item 2 is inf; a setting must be a finite number",
}
REFERENCES = {
    "a+b+c": (
        "2: 'a+b+c' is not a model: it has more than one '+';"
        " a path with '+' is written as a mapping {model: {path: …}}"
    ),
    "a+": "2: 'a+' is not a model: after '+' comes the path of a LoRA",
    "+a": "2: '+a' is not a model: its path is empty",
    "a@": "2: 'a@' is not a model: after '@' comes a revision",
    "''": "2: '' is not a model: its path is empty",
    "3": f"2: {WRITTEN}, not the number 3",
    "[a]": f"2: {WRITTEN}, not a list",
    "": f"2: {WRITTEN}, not nothing",
    "{model: 3}": "2: 'model' must be text or a mapping with path and revision, not the number 3",
    "{model: {path: a,\n  rev: b}}": (
        "3: unknown key 'rev'; known here: path, revision, lora, adapters, override_architecture"
    ),
    "{model: {path: a,\n  revision: 3}}": "3: 'revision' must be text, not the number 3; put it in quotes",
    "{model: {path: ' '}}": "2: 'path' must not be an empty text",
    "{model: a+b, lora: c}": "2: 'lora' is given twice for one model",
    "{model: a, lora: b+c}": "2: a LoRA has only a path and a revision",
    "{lora: b}": "2: a model needs the key 'path'",
}
THE_REST = {
    "dtype: flaot16": "3: 'dtype' is 'flaot16', an unknown dtype; did you mean 'float16'?",
    "dtype: torch.bflot16": "3: 'dtype' is 'torch.bflot16', an unknown dtype; did you mean 'bfloat16'?",
    "dtype: int8": "3: 'dtype' is 'int8', an unknown dtype; known: float32, float16, bfloat16, float64",
    "out_dtype: 16": "3: 'out_dtype' must be the name of a dtype, not the number 16",
    "chat_template: chatlm": (
        "3: 'chat_template' is 'chatlm', neither a known name nor a Jinja template; did you mean 'chatml'?"
    ),
    "chat_template: 3": "3: 'chat_template' must be text, not the number 3; put it in quotes",
    "parameters: [t]": "3: 'parameters' must be a mapping of names to values, not a list",
    "tokenizer: {source: base}\ntokenizer_source: union": (
        "4: a recipe has at most one of tokenizer and tokenizer_source; both are here"
    ),
    "parameters: {}\ntokenizer_source: 3": f"4: {WRITTEN}, not the number 3",
    "tokenizer: union": (
        "3: a tokenizer must be a mapping with the keys source, tokens, pad_to_multiple_of, missing, "
        "not the text 'union'"
    ),
    "tokenizer: {sorce: union}": "3: unknown key 'sorce'; did you mean 'source'?",
    "tokenizer: {pad_to_multiple_of: 0}": ("3: 'pad_to_multiple_of' must be from 1 to 2147483647, not the number 0"),
    "tokenizer: {pad_to_multiple_of: eight}": ("3: 'pad_to_multiple_of' must be a whole number, not the text 'eight'"),
    "tokenizer:\n  tokens: [a]": "4: 'tokens' must be a mapping of names to values, not a list",
    "tokenizer:\n  tokens:\n    <s>: {force: 1}": "5: 'force' must be true or false, not the number 1",
    "tokenizer:\n  tokens:\n    <s>:\n      source: {kind: zreo}": (
        "6: 'kind' is 'zreo', an unknown kind of row; did you mean 'zero'?"
    ),
    "tokenizer:\n  tokens:\n    <s>: {source: {kind: model_token, model: a}}": (
        "5: a token's source of kind model_token needs exactly one of token, token_id; none is here"
    ),
    "tokenizer:\n  tokens:\n    <s>: {source: {kind: model_token, model: a, token: x, token_id: 3}}": (
        "5: a token's source of kind model_token needs exactly one of token, token_id; 'token_id' stands beside 'token'"
    ),
}


@pytest.mark.parametrize(("text", "message"), [*YAML.items(), *WHAT_IS_MERGED.items(), *SLICES.items()])
def test_a_bad_recipe_is_told_in_one_line(text, message):
    assert say_fault(text) == message


@pytest.mark.parametrize(("written", "message"), SETTINGS.items())
def test_a_bad_setting_is_told_in_one_line(written, message):
    assert say_fault(f"{MODELS}parameters:\n  {written}\n") == message


@pytest.mark.parametrize(("written", "message"), REFERENCES.items())
def test_a_bad_reference_is_told_in_one_line(written, message):
    assert say_fault(f"merge_method: m\nmodels: [{{model: {written}}}]\n") == message


@pytest.mark.parametrize(("written", "message"), THE_REST.items())
def test_any_other_bad_key_is_told_in_one_line(written, message):
    assert say_fault(f"{MODELS}{written}\n") == message


@pytest.mark.parametrize("written", ["float16", "FP16", "half", "torch.float16"])
def test_spellings_of_a_dtype_are_one(written):
    assert parse_recipe(f"{MODELS}dtype: {written}\n").dtype == "float16"


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(faults).failed == 0


def test_a_step_has_a_name_and_open_settings():
    assert say_fault(MODELS + "coefficients: {alpha: 1}\n") == "3: a step needs the key 'method'"
    fault = "3: a step must be a mapping with the key method and its settings, not the text 'lines'"
    assert say_fault(MODELS + "coefficients: lines\n") == fault
    assert say_fault(MODELS + "post: [{method: svc, alpha: .nan}]\n").endswith("a setting must be a finite number")
    assert say_fault(MODELS + "post: []\n") == "3: 'post' is an empty list and needs at least one item"


def test_a_guard_knows_three_policies():
    fault = "3: 'policy' is 'wran', and must be one of warn, keep-base, fail; did you mean 'warn'?"
    assert say_fault(MODELS + "guard: {policy: wran}\n") == fault
    assert say_fault(MODELS + "guard: {growth: 0}\n") == "3: 'growth' must be a number above 0, not the number 0"

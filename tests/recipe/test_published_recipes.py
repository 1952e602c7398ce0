"""Recipes of every shape that mergekit's users publish, parsed to the values they mean."""

import pytest

from mergemill.engine.recipe import (
    Condition,
    ModelRef,
    ModelRow,
    Parameters,
    Recipe,
    Token,
    Tokenizer,
    ZeroRow,
    parse_recipe,
)

LINEAR = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""

SLERP = """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""

TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

DARE = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: yes
dtype: bfloat16
"""

FRANKENMERGE = """\
slices:
  - sources:
    - model: liminerity/M7-7b
      layer_range: [0, 24]
  - sources:
    - model: AurelPx/Percival_01-7b-slerp@main
      layer_range: [8, 32]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""

TOKENIZER = """\
merge_method: linear
models:
  - {model: org/a, parameters: {weight: 1}}
  - {model: org/b, parameters: {weight: 1}}
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: org/b
    <|im_end|>:
      source: {kind: model_token, model: org/a, token: </s>}
      force: true
    <|unused|>:
      source:
        kind: zero
    "<|id|>": {source: {kind: model_token, model: org/a, token_id: 7}}
  pad_to_multiple_of: 64
chat_template: chatml
"""

MODULES = """\
merge_method: linear
dtype: float32
out_dtype: bfloat16
modules:
  text_decoder:
    slices:
      - sources:
          - {model: a/vlm, layer_range: [0, 2]}
          - {model: b/vlm, layer_range: [2, 4]}
        base_model: a/vlm
        parameters: {weight: 0.5}
  vision_tower:
    models:
      - model: a/vlm
parameters:
  weight: 1
"""

LORA = """\
models:
  - model: meta-llama/Llama-2-7b-hf+lora-org/some-adapter
  - model: meta-llama/Llama-2-7b-hf@main+lora-org/other@v2
merge_method: task_arithmetic
base_model: {model: {path: meta-llama/Llama-2-7b-hf, revision: main}, override_architecture: LlamaForCausalLM}
parameters: {weight: 0.5, lambda: 1e-1}
tokenizer_source: base
"""


def test_linear():
    recipe = parse_recipe(LINEAR)
    assert recipe.merge_method == "linear"
    assert recipe.dtype == "float16"
    assert [str(entry.model) for entry in recipe.models] == [
        "psmathur/orca_mini_v3_13b",
        "WizardLM/WizardLM-13B-V1.2",
    ]
    assert recipe.models[1].parameters == Parameters({"weight": 0.3})


def test_slerp_with_gradients_under_filters():
    recipe = parse_recipe(SLERP)
    assert recipe.slices[0].layers == 40
    assert recipe.slices[0].sources[1].layer_range == (0, 40)
    assert recipe.parameters["t"] == (
        Condition(filter="self_attn", value=(0, 0.5, 0.3, 0.7, 1)),
        Condition(filter="mlp", value=(1, 0.5, 0.7, 0.3, 0)),
        Condition(value=0.5),
    )


def test_ties():
    recipe = parse_recipe(TIES)
    assert recipe.models[0].parameters["density"] == (1, 0.7, 0.1)
    assert recipe.models[2].parameters["weight"] == (Condition(filter="mlp", value=0.5), Condition(value=0))
    assert dict(recipe.parameters) == {"normalize": True, "int8_mask": True}


def test_dare_ties_with_a_base_without_parameters():
    recipe = parse_recipe(DARE)
    assert recipe.base_model == recipe.models[0].model == ModelRef(path="mistralai/Mistral-7B-v0.1")
    assert recipe.models[0].parameters == Parameters()
    assert recipe.parameters["int8_mask"] is True


def test_frankenmerge():
    recipe = parse_recipe(FRANKENMERGE)
    assert [part.layers for part in recipe.slices] == [24, 24]
    assert recipe.slices[1].sources[0].model.revision == "main"
    assert recipe.slices[1].sources[0].parameters["scale"][0].matches("model.layers.3.self_attn.o_proj.weight")


def test_tokenizer_with_tokens():
    tokenizer = parse_recipe(TOKENIZER).tokenizer
    assert tokenizer.source == "union"
    assert tokenizer.pad_to_multiple_of == 64
    assert dict(tokenizer.tokens) == {
        "<|im_start|>": Token(source=ModelRef(path="org/b")),
        "<|im_end|>": Token(source=ModelRow(model=ModelRef(path="org/a"), token="</s>"), force=True),
        "<|unused|>": Token(source=ZeroRow()),
        "<|id|>": Token(source=ModelRow(model=ModelRef(path="org/a"), token_id=7)),
    }


def test_modules():
    recipe = parse_recipe(MODULES)
    assert list(recipe.modules) == ["text_decoder", "vision_tower"]
    assert recipe.modules["text_decoder"].slices[0].base_model == ModelRef(path="a/vlm")
    assert recipe.modules["vision_tower"].models[0].model == ModelRef(path="a/vlm")
    assert (recipe.dtype, recipe.out_dtype) == ("float32", "bfloat16")


def test_lora():
    recipe = parse_recipe(LORA)
    assert recipe.models[1].model == ModelRef(
        path="meta-llama/Llama-2-7b-hf",
        revision="main",
        lora=ModelRef(path="lora-org/other", revision="v2"),
    )
    assert recipe.base_model.override_architecture == "LlamaForCausalLM"
    assert recipe.parameters["lambda"] == 0.1


@pytest.mark.parametrize(
    ("written", "source"),
    [("union", "union"), ("base", "base"), ("org/a@v1", ModelRef(path="org/a", revision="v1"))],
)
def test_tokenizer_source_is_the_short_form_of_tokenizer(written, source):
    recipe = parse_recipe(LINEAR + f"tokenizer_source: {written}\n")
    assert recipe.tokenizer == Tokenizer(source=source)


def test_text_and_name_are_kept_and_do_not_count():
    recipe = parse_recipe(LINEAR, name="a.yml")
    other = parse_recipe("# a comment\n" + LINEAR, name="b.yml")
    assert (recipe.text, recipe.file) == (LINEAR, "a.yml")
    assert recipe == other
    assert hash(recipe) == hash(other)


def test_empty_optional_keys_count_as_absent():
    empty = "parameters:\nbase_model:\nslices:\ndtype:\ntokenizer:\ntokenizer_source:\nchat_template:\n"
    assert parse_recipe(LINEAR.replace("dtype: float16\n", empty)) == parse_recipe(
        LINEAR.replace("dtype: float16\n", "")
    )


def test_recipes_are_made_in_python_as_well():
    recipe = Recipe(merge_method="linear", models=[{"model": "org/a", "parameters": {"weight": 1}}])
    assert recipe == parse_recipe("{merge_method: linear, models: [{model: org/a, parameters: {weight: 1}}]}")

"""Families: names of real checkpoints fall where they belong."""

import pytest

from mergemill.engine.checkpoint import (
    choose_family,
    find_side,
    find_tie,
    is_optional,
    is_vocabulary,
    join_layer,
    layer_stacks,
    split_layer,
)
from mergemill.engine.checkpoint.family import find_ties

LLAMA = choose_family({"model_type": "llama"})

BEFORE = [
    ("llama", "model.embed_tokens.weight"),
    ("llama", "model.rotary_emb.inv_freq"),
    ("gemma3", "model.language_model.embed_tokens.weight"),
    ("gpt2", "wte.weight"),
    ("gpt2", "transformer.wpe.weight"),
    ("gpt_neox", "gpt_neox.embed_in.weight"),
    ("bloom", "transformer.word_embeddings_layernorm.weight"),
    ("bert", "bert.embeddings.LayerNorm.weight"),
    ("opt", "model.decoder.embed_positions.weight"),
    ("bart", "model.decoder.layernorm_embedding.weight"),
    ("t5", "shared.weight"),
    ("mamba", "backbone.embeddings.weight"),
    ("gemma3n", "model.language_model.per_layer_model_projection.weight"),
]
AFTER = [
    ("llama", "model.norm.weight"),
    ("llama", "lm_head.weight"),
    ("gpt2", "ln_f.weight"),
    ("gpt_neox", "embed_out.weight"),
    ("gpt_neox", "gpt_neox.final_layer_norm.bias"),
    ("t5", "encoder.final_layer_norm.weight"),
    ("bert", "cls.predictions.transform.dense.weight"),
    ("lfm2", "model.embedding_norm.weight"),
    ("mistral3", "multi_modal_projector.linear_1.weight"),
    ("mamba", "backbone.norm_f.weight"),
]


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [(*case, "before") for case in BEFORE] + [(*case, "after") for case in AFTER],
)
def test_tensor_outside_the_layers_has_its_side(model_type, name, expected):
    assert find_side(name, choose_family({"model_type": model_type})) == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers", 12, "mlp.up_proj.weight")),
        ("h.0.attn.bias", ("h", 0, "attn.bias")),
        ("encoder.block.3.layer.1.wi.weight", ("encoder.block", 3, "layer.1.wi.weight")),
        (
            "model.layers.4.block_sparse_moe.experts.7.w1.weight",
            ("model.layers", 4, "block_sparse_moe.experts.7.w1.weight"),
        ),
        ("0.weight", ("", 0, "weight")),
        ("prompts.3", ("prompts", 3, "")),
        ("model.norm.weight", None),
        ("layers.01.weight", None),
        ("layers.²", None),
        ("conv1.weight", None),
    ],
)
def test_layer_is_the_first_number_of_a_name(name, parts):
    assert split_layer(name) == parts
    assert parts is None or join_layer(*parts) == name


def test_stacks_hold_their_layers_in_order():
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in (10, 9, 2) for j in range(3)]
    stacks = layer_stacks([*names, "visual.blocks.0.w", "lm_head.weight"])
    assert stacks == {"model.layers": (2, 9, 10), "visual.blocks": (0,)}
    assert list(stacks) == ["model.layers", "visual.blocks"]


@pytest.mark.parametrize(
    ("model_type", "name", "names", "expected"),
    [
        ("llama", "lm_head.weight", ["model.embed_tokens.weight"], "model.embed_tokens.weight"),
        (
            "gemma3",
            "lm_head.weight",
            ["model.language_model.embed_tokens.weight", "model.layers.61.embed_tokens.weight"],
            "model.language_model.embed_tokens.weight",
        ),
        ("gpt2", "lm_head.weight", ["wte.weight"], "wte.weight"),
        ("gpt_neox", "embed_out.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        ("t5", "encoder.embed_tokens.weight", ["shared.weight"], "shared.weight"),
        (
            "bart",
            "lm_head.weight",
            ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
            "model.shared.weight",
        ),
        (
            "whisper",
            "proj_out.weight",
            ["model.decoder.embed_tokens.weight"],
            "model.decoder.embed_tokens.weight",
        ),
        ("gpt_neox", "lm_head.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        (
            "modernbert",
            "decoder.weight",
            ["model.embeddings.tok_embeddings.weight"],
            "model.embeddings.tok_embeddings.weight",
        ),
        ("llama", "lm_head.weight", ["a.embed_tokens.weight", "b.embed_tokens.weight"], None),
        ("llama", "lm_head.weight", ["lm_head.weight", "model.norm.weight"], None),
        ("llama", "model.norm.weight", ["model.embed_tokens.weight"], None),
    ],
)
def test_tie_is_found_where_only_one_tensor_can_be_meant(model_type, name, names, expected):
    assert find_tie(name, names, choose_family({"model_type": model_type})) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "lm_head.bias",
        "transformer.wte.weight",
        "embed_out.weight",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "shared.weight",
        "model.layers.61.shared_head.head.weight",
    ],
)
def test_rows_of_these_are_tokens(name):
    assert is_vocabulary(name, LLAMA)


@pytest.mark.parametrize("name", ["model.norm.weight", "wpe.weight", "model.layers.0.mlp.shared.weight"])
def test_rows_of_these_are_not_tokens(name):
    assert not is_vocabulary(name, LLAMA)


def test_buffers_of_gpt2_are_optional_and_biases_of_others_are_not():
    assert is_optional("h.0.attn.bias", choose_family({"model_type": "gpt2"}))
    assert not is_optional("h.0.attn.c_attn.bias", choose_family({"model_type": "gpt2"}))
    assert not is_optional("h.0.attn.bias", LLAMA)
    assert is_optional("model.layers.0.self_attn.rotary_emb.inv_freq", LLAMA)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "new"}, {"model_type": ["x"]}])
def test_unknown_type_has_the_default_family(config):
    assert choose_family(config) == LLAMA


def test_ties_of_many_names_are_those_of_each() -> None:
    family = choose_family({})
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.weight"]
    lacking = ["lm_head.weight", "model.lm_head.weight", "model.norm.weight"]
    assert find_ties(lacking, names, family) == {
        name: tie for name in lacking if (tie := find_tie(name, names, family)) is not None
    }
    assert find_ties(["lm_head.weight"], [*names, "other.embed_tokens.weight"], family) == {}

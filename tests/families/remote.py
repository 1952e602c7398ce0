"""Families whose code is on the Hub, not in transformers: configs and names of tensors as published, in tiny.

A row is what a small model of the family stores. Shapes are small, names and keys are the published ones (of the models
named in each row, read 2026-11-30); what a layer's kind or shape hangs on is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
H, V, F, L = 8, 20, 12, 4  # width, tokens, inner width, layers


@dataclass(frozen=True, slots=True)
class RemoteFamily:
    """A family, and what is to come of a stack of it."""

    config: Mapping[str, Any]
    stem: str  # of the layers
    layer: Callable[[int], Shapes]
    outside: Shapes
    count: str  # the key that counts layers
    lists: tuple[str, ...] = ()  # keys with an entry a layer
    verdict: str = "kept"  # "told": by a warning; "refused"
    why: str = ""  # a part of what is told, or of the refusal
    head: str = ""  # the tensor that is the head; empty: tied, none is stored


def _matrices(names: str, rows: int = H, columns: int = H) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns) for name in names.split()}


def _norms(names: str, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (H,) for name in names.split() for kind in (("weight", "bias") if bias else ("weight",))}


def _mlp(gate: str = "mlp.gate_proj mlp.up_proj", down: str = "mlp.down_proj") -> dict[str, tuple[int, ...]]:
    return _matrices(gate, F, H) | _matrices(down, H, F)


def _llama(i: int) -> Shapes:
    names = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    return _matrices(names) | _mlp() | _norms("input_layernorm post_attention_layernorm")


def _outside(embedding: str, norm: str, head: str = "", *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return _matrices(embedding, V) | _norms(norm, bias=bias) | (_matrices(head, V) if head else {})


LLAMA_OUTSIDE = _outside("model.embed_tokens", "model.norm", "lm_head")


def _openelm(i: int) -> Shapes:
    heads, ffn = (2, 2, 4, 4)[i], (4, 8, 8, 12)[i]
    attention = {"attn.qkv_proj.weight": (2 * heads * 3, H), "attn.out_proj.weight": (H, 2 * heads)}
    attention |= {"attn.q_norm.weight": (2,), "attn.k_norm.weight": (2,)}
    return attention | _matrices("ffn.proj_1", 2 * ffn) | _matrices("ffn.proj_2", H, ffn) | _norms("attn_norm ffn_norm")


def _chatglm(prefix: str, *, bias: bool) -> Callable[[int], Shapes]:
    def layer(i: int) -> Shapes:
        made = _matrices(f"{prefix}.query_key_value", 3 * H) | {f"{prefix}.query_key_value.bias": (3 * H,)}
        made |= _matrices(f"{prefix}.dense") | _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        made |= _norms("input_layernorm post_attention_layernorm", bias=bias)
        return made | ({"attention.rotary_emb.inv_freq": (2,)} if prefix == "attention" else {})

    return layer


def _arctic(i: int) -> Shapes:
    made = {**_llama(i), **_norms("residual_layernorm")}
    mixture = i % 2 == 1
    made = {name: shape for name, shape in made.items() if not name.startswith("mlp.")}
    made |= _mlp("residual_mlp.w1 residual_mlp.w3", "residual_mlp.w2") if mixture else {}
    if not mixture:
        return made | _mlp("block_sparse_moe.mlp.w1 block_sparse_moe.mlp.w3", "block_sparse_moe.mlp.w2")
    for e in range(2):
        stem = f"block_sparse_moe.experts.{e}"
        made |= _mlp(f"{stem}.w1 {stem}.w3", f"{stem}.w2")
    return made | {"block_sparse_moe.gate.weight": (2, H)}


def _hyena(i: int) -> Shapes:
    made = _norms("pre_norm post_norm") | _mlp("mlp.l1 mlp.l2", "mlp.l3") | _matrices("projections", 3 * H)
    if i in (1, 3):
        return made | _matrices("inner_mha_cls.Wqkv", 3 * H) | _matrices("inner_mha_cls.out_proj")
    return made | {"filter.poles": (H, 2, 1, 2), "filter.residues": (H, 2, 1, 2), "filter.D": (H,)}


def _rwkv5(i: int) -> Shapes:
    made = _norms("ln1 ln2", bias=True) | (_norms("pre_ln", bias=True) if i == 0 else {})
    made |= _matrices("attention.key attention.value attention.receptance attention.gate attention.output")
    made |= {"attention.time_decay": (2, 4), "attention.time_faaaa": (2, 4), "attention.time_mix_key": (1, 1, H)}
    return made | _mlp("feed_forward.key", "feed_forward.value") | _matrices("feed_forward.receptance")


def _nas(i: int) -> Shapes:
    made = {**_llama(i)}
    if i == 1:  # a layer without attention
        made = {name: shape for name, shape in made.items() if "attn" not in name and not name.startswith("input_")}
    return made


FAMILIES: Mapping[str, RemoteFamily] = {
    "openelm": RemoteFamily(  # apple/OpenELM-270M
        {
            "num_transformer_layers": L,
            "num_query_heads": [2, 2, 4, 4],
            "num_kv_heads": [2, 2, 4, 4],
            "ffn_multipliers": [0.5, 1.0, 1.0, 1.5],
            "share_input_output_layers": True,
            "model_dim": H,
        },
        "transformer.layers",
        _openelm,
        _outside("transformer.token_embeddings", "transformer.norm"),
        "num_transformer_layers",
        ("num_query_heads", "num_kv_heads", "ffn_multipliers"),
    ),
    "chatglm": RemoteFamily(  # THUDM/chatglm3-6b
        {"num_layers": L, "padded_vocab_size": V, "tie_word_embeddings": False, "hidden_size": H},
        "transformer.encoder.layers",
        _chatglm("self_attention", bias=False),
        _outside(
            "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer"
        )
        | {"transformer.rotary_pos_emb.inv_freq": (2,)},
        "num_layers",
        head="transformer.output_layer.weight",
    ),
    "chatglm-6b": RemoteFamily(  # THUDM/chatglm-6b
        {"model_type": "chatglm", "num_layers": L, "vocab_size": V, "hidden_size": H},
        "transformer.layers",
        _chatglm("attention", bias=True),
        _outside("transformer.word_embeddings", "transformer.final_layernorm", "lm_head", bias=True),
        "num_layers",
        head="lm_head.weight",
    ),
    "internlm2": RemoteFamily(  # internlm/internlm2-7b
        {"num_hidden_layers": L, "vocab_size": V, "tie_word_embeddings": False, "hidden_size": H},
        "model.layers",
        lambda i: (
            _matrices("attention.wqkv", 2 * H)
            | _matrices("attention.wo")
            | _mlp("feed_forward.w1 feed_forward.w3", "feed_forward.w2")
            | _norms("attention_norm ffn_norm")
        ),
        _outside("model.tok_embeddings", "model.norm", "output"),
        "num_hidden_layers",
        head="output.weight",
    ),
    "internlm": RemoteFamily(  # internlm/internlm-7b
        {"num_hidden_layers": L, "vocab_size": V, "tie_word_embeddings": False, "hidden_size": H, "bias": True},
        "model.layers",
        lambda i: {**_llama(i), **{f"self_attn.{each}_proj.bias": (H,) for each in "qkvo"}},
        LLAMA_OUTSIDE,
        "num_hidden_layers",
        head="lm_head.weight",
    ),
    "baichuan": RemoteFamily(  # baichuan-inc/Baichuan2-7B-Base
        {"num_hidden_layers": L, "vocab_size": V, "tie_word_embeddings": False, "hidden_size": H},
        "model.layers",
        lambda i: (
            _matrices("self_attn.W_pack", 3 * H)
            | _matrices("self_attn.o_proj")
            | _mlp()
            | _norms("input_layernorm post_attention_layernorm")
        ),
        LLAMA_OUTSIDE,
        "num_hidden_layers",
        head="lm_head.weight",
    ),
    "qwen": RemoteFamily(  # Qwen/Qwen-7B
        {"num_hidden_layers": L, "vocab_size": V, "tie_word_embeddings": False, "hidden_size": H},
        "transformer.h",
        lambda i: (
            _matrices("attn.c_attn", 3 * H)
            | {"attn.c_attn.bias": (3 * H,)}
            | _matrices("attn.c_proj")
            | _mlp("mlp.w1 mlp.w2", "mlp.c_proj")
            | _norms("ln_1 ln_2")
        ),
        _outside("transformer.wte", "transformer.ln_f", "lm_head"),
        "num_hidden_layers",
        head="lm_head.weight",
    ),
    "mpt": RemoteFamily(  # mosaicml/mpt-7b
        {"n_layers": L, "vocab_size": V, "d_model": H, "attn_config": {"alibi": True}},
        "transformer.blocks",
        lambda i: (
            _matrices("attn.Wqkv", 3 * H)
            | _matrices("attn.out_proj")
            | _mlp("ffn.up_proj", "ffn.down_proj")
            | _norms("norm_1 norm_2")
        ),
        _outside("transformer.wte", "transformer.norm_f"),
        "n_layers",
    ),
    "phi3small": RemoteFamily(  # microsoft/Phi-3-small-8k-instruct
        {
            "num_hidden_layers": L,
            "vocab_size": V,
            "hidden_size": H,
            "dense_attention_every_n_layers": 2,
            "tie_word_embeddings": True,
        },
        "model.layers",
        lambda i: (
            _matrices("self_attn.query_key_value", 2 * H)
            | _matrices("self_attn.dense")
            | _mlp("mlp.up_proj", "mlp.down_proj")
            | _norms("input_layernorm post_attention_layernorm", bias=True)
        ),
        _outside("model.embed_tokens", "model.final_layernorm", bias=True),
        "num_hidden_layers",
        verdict="refused",
        why="dense_attention_every_n_layers",
    ),
    "Yi": RemoteFamily(  # 01-ai/Yi-6B, as first published
        {"num_hidden_layers": L, "vocab_size": V, "tie_word_embeddings": False, "hidden_size": H},
        "model.layers",
        lambda i: {
            **{name: shape for name, shape in _llama(i).items() if "layernorm" not in name},
            **_norms("ln1 ln2"),
        },
        LLAMA_OUTSIDE,
        "num_hidden_layers",
        head="lm_head.weight",
    ),
    "minicpm": RemoteFamily(  # openbmb/MiniCPM-2B-sft-bf16: each layer is scaled by the root of their number
        {"num_hidden_layers": L, "vocab_size": V, "hidden_size": H, "scale_depth": 1.4, "tie_word_embeddings": True},
        "model.layers",
        _llama,
        _outside("model.embed_tokens", "model.norm"),
        "num_hidden_layers",
        verdict="told",
        why="calculates",
    ),
    "nemotron-nas": RemoteFamily(  # nvidia/Llama-3_1-Nemotron-51B-Instruct
        {
            "num_hidden_layers": L,
            "vocab_size": V,
            "hidden_size": H,
            "tie_word_embeddings": False,
            "block_configs": [{"attention": {"no_op": i == 1}, "ffn": {"ffn_mult": 1.5}} for i in range(L)],
        },
        "model.layers",
        _nas,
        LLAMA_OUTSIDE,
        "num_hidden_layers",
        ("block_configs",),
        head="lm_head.weight",
    ),
    "RefinedWebModel": RemoteFamily(  # tiiuae/falcon-7b, as first published
        {"n_layer": L, "vocab_size": V, "hidden_size": H, "n_head": 2, "multi_query": True},
        "transformer.h",
        lambda i: (
            _matrices("self_attention.query_key_value", 2 * H)
            | _matrices("self_attention.dense")
            | _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            | _norms("input_layernorm", bias=True)
        ),
        _outside("transformer.word_embeddings", "transformer.ln_f", "lm_head", bias=True),
        "n_layer",
        head="lm_head.weight",
    ),
    "llada": RemoteFamily(  # GSAI-ML/LLaDA-8B-Base
        {"n_layers": L, "vocab_size": V, "d_model": H, "weight_tying": False},
        "model.transformer.blocks",
        lambda i: (
            _matrices("q_proj k_proj v_proj attn_out") | _mlp("ff_proj up_proj", "ff_out") | _norms("attn_norm ff_norm")
        ),
        _outside("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
        "n_layers",
        head="model.transformer.ff_out.weight",
    ),
    "arctic": RemoteFamily(  # Snowflake/snowflake-arctic-base: every second layer has experts
        {
            "num_hidden_layers": L,
            "vocab_size": V,
            "hidden_size": H,
            "moe_layer_frequency": 2,
            "num_local_experts": 2,
            "tie_word_embeddings": False,
        },
        "model.layers",
        _arctic,
        LLAMA_OUTSIDE,
        "num_hidden_layers",
        verdict="refused",
        why="layer",
        head="lm_head.weight",
    ),
    "stripedhyena": RemoteFamily(  # togethercomputer/StripedHyena-Nous-7B
        {
            "num_layers": L,
            "vocab_size": V,
            "hidden_size": H,
            "attn_layer_idxs": [1, 3],
            "hyena_layer_idxs": [0, 2],
            "tie_embeddings": False,
        },
        "backbone.blocks",
        _hyena,
        _outside("backbone.embedding_layer", "backbone.norm", "backbone.unembed"),
        "num_layers",
        ("attn_layer_idxs", "hyena_layer_idxs"),
        head="backbone.unembed.weight",
    ),
    "rwkv5": RemoteFamily(  # RWKV/rwkv-5-world-1b5: the first layer has one more norm
        {"num_hidden_layers": L, "vocab_size": V, "hidden_size": H, "tie_word_embeddings": False},
        "rwkv.blocks",
        _rwkv5,
        _outside("rwkv.embeddings", "rwkv.ln_out", "head", bias=True),
        "num_hidden_layers",
        head="head.weight",
    ),
}

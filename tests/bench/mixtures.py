"""The tensors of a large mixture of experts: the names and shapes of DeepSeek-V3, 671 billion parameters.

Source: arXiv:2412.19437, section 4.2, and the checkpoint's index on the Hub (without its layer for more predictions).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """The sizes that decide a mixture's tensors; those of attention are the model's own."""

    layers: int = 61
    dense: int = 3  # of the layers, the first
    experts: int = 256
    hidden: int = 7168
    wide: int = 18_432  # of a dense layer
    expert_wide: int = 2048
    vocabulary: int = 129_280


V3 = Mixture()  # 45,395 tensors
FINE = Mixture(experts=512, expert_wide=1024)  # as many parameters in twice as many experts: 89,939 tensors


def list_experts(mixture: Mixture) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor, in the order of the model."""
    hidden = mixture.hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (mixture.vocabulary, hidden)}
    for i in range(mixture.layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in _list_attention(hidden).items()}
        if i < mixture.dense:
            shapes |= _list_gated(f"{layer}.mlp", hidden, mixture.wide)
        else:
            shapes[f"{layer}.mlp.gate.weight"] = (mixture.experts, hidden)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (mixture.experts,)
            for expert in (*(f"experts.{number}" for number in range(mixture.experts)), "shared_experts"):
                shapes |= _list_gated(f"{layer}.mlp.{expert}", hidden, mixture.expert_wide)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (mixture.vocabulary, hidden)}


def _list_attention(hidden: int) -> Mapping[str, tuple[int, ...]]:
    return {
        "q_a_proj": (1536, hidden),
        "q_a_layernorm": (1536,),
        "q_b_proj": (24_576, 1536),
        "kv_a_proj_with_mqa": (576, hidden),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (32_768, 512),
        "o_proj": (hidden, 16_384),
    }


def _list_gated(name: str, hidden: int, wide: int) -> Mapping[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (wide, hidden),
        f"{name}.up_proj.weight": (wide, hidden),
        f"{name}.down_proj.weight": (hidden, wide),
    }


def make_mixture_config(mixture: Mixture) -> dict[str, object]:
    """Return the config.json that goes with `list_experts`."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": mixture.hidden,
        "intermediate_size": mixture.wide,
        "moe_intermediate_size": mixture.expert_wide,
        "n_routed_experts": mixture.experts,
        "first_k_dense_replace": mixture.dense,
        "num_hidden_layers": mixture.layers,
        "vocab_size": mixture.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }

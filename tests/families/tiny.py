"""Tiny random models of every family of transformers, by its configuration classes, each size small by its name."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

LAYERS = 8  # of a stack that slices are taken from: most patterns of kinds repeat within so many
INNER_LAYERS = 2  # of towers beside the language model

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "encoder_layers", "decoder_layers",
           "num_encoder_layers", "num_decoder_layers", "depth", "num_transformer_layers")  # fmt: skip
_SIZES: tuple[tuple[str, int], ...] = (  # a pattern of a key, and what it becomes; the first that matches
    (r"vocab_size(_per_layer_input)?|embedding_vocab_size", 64),
    (r"(encoder|decoder)_attention_heads|num_attention_heads|n_heads?|num_heads|attention_heads", 4),
    (r"num_(key_value|kv)_heads|n_kv_heads|multi_query_group_num|num_global_key_value_heads", 2),
    (r"(head_dim|d_kv|attention_head_dim|attention_head_size|kv_channels|v_head_dim|global_head_dim|d_head)", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim", 8),
    (r"(kv|q)_lora_rank", 16),
    (r"(moe_|shared_)?(expert_)?intermediate_(size|dim)|.*ffn_(hidden_)?(dim|size)|d_ff|ffn_hidden_size|n_inner", 48),
    (r".*intermediate_size.*", 48),
    (r"hidden_size|d_model|n_embd|embedding_size|embed_dim|dim|emb_dim|hidden_dim|d_embed|word_embed_proj_dim", 32),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"(num_experts_per_tok(en)?|top_k_experts|moe_top_k|moe_topk|moe_k|num_selected_experts)", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|max_sequence_length", 64),
    (r"image_size", 28), (r"patch_size", 14),
    (r"projection_dim|out_hidden_size", 32),
)  # fmt: skip
_MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")


def list_families() -> dict[str, str]:
    """Return the class with a head of every text family, by its ``model_type``."""
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            found.setdefault(kind, names if isinstance(names, str) else names[0])
    return found


def find_class(kind: str) -> type[PreTrainedModel]:
    """Return the class with a head that takes the family's own config, and not that of its language model alone."""
    named = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").get(kind) for mapping in _MAPPINGS]
    kinds = [getattr(transformers, each if isinstance(each, str) else each[0]) for each in named if each]
    own = CONFIG_MAPPING[kind]
    return next((each for each in kinds if each.config_class is own), kinds[0])


def make_config(kind: str, given: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a small config of a family; `given` are keys that its names do not tell, by dotted path."""
    return _shrink(CONFIG_MAPPING[kind], LAYERS, given)


def make_model(kind: str, given: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Return a random model of a family."""
    torch.manual_seed(seed)
    config = make_config(kind, given)
    model = find_class(kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    return model.eval()


def _shrink(cls: type[PreTrainedConfig], layers: int, given: Mapping[str, Any]) -> PreTrainedConfig:
    inner = getattr(cls, "sub_configs", {})
    default = cls()
    own = {key: value for key, value in given.items() if "." not in key}
    for key, value in default.to_dict().items():
        if key not in own and type(value) is int:
            small = _small(key, value, layers)
            if small is not None:
                own[key] = small
    for key in inner:
        part = getattr(default, key, None)
        if part is None or key in own:
            continue
        rest = {name.removeprefix(f"{key}."): value for name, value in given.items() if name.startswith(f"{key}.")}
        text = any(word in key for word in ("text", "llm", "language", "decoder", "encoder", "thinker"))
        own[key] = _shrink(type(part), layers if text else INNER_LAYERS, rest).to_dict()
    return cls(**own)


def _small(key: str, value: int, layers: int) -> int | None:
    if key in _LAYERS:
        return layers
    if re.fullmatch(r".*token_id|.*token_index", key):
        return value if value < 64 else 5
    for pattern, small in _SIZES:
        if re.fullmatch(pattern, key):
            return small
    return None

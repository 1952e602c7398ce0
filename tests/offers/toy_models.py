"""Tiny real models that transformers saves, in the layout of the Hub or its own, and what they are stacks of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
MIXTURE = {**SIZES, "hidden_size": 32, "intermediate_size": 48}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {**MIXTURE, "num_local_experts": 4},
    "phimoe": {**MIXTURE, "num_local_experts": 4},
    "granitemoe": {**MIXTURE, "num_local_experts": 4},
    "qwen3_moe": {**MIXTURE, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        **MIXTURE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {**MIXTURE, "num_local_experts": 4, "head_dim": 8},
    "llama": {**MIXTURE},
    "phi3": {**MIXTURE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def save_model(kind: str, folder: Path, seed: int, *, packed: bool, near: Path | None = None) -> Path:
    """Save a random model of `kind`; `near`: another one that it is a fine-tune of; packed: as transformers has it."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    if near is not None:
        source = transformers.AutoModelForCausalLM.from_pretrained(near, dtype=torch.float32)
        stream = torch.Generator().manual_seed(seed)
        for name, value in source.state_dict().items():
            model.state_dict()[name].copy_(value + 0.01 * torch.randn(value.shape, generator=stream))
    model.save_pretrained(folder, save_original_format=not packed)
    return folder


def load_strictly(folder: Path) -> dict[str, torch.Tensor]:
    """Return what transformers makes of a model, none of whose tensors may be missing, unknown or misshapen."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return dict(model.state_dict())

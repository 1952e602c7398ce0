"""Tiny random models of several families, as transformers saves them, and what transformers makes of a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXT = "The harbour wakes before the town, über alles: the boats go out one by one. " * 6

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "phi": {},  # its head has a bias
    "phi3": {},
    "gpt_neox": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}


def write_family(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a tiny random model of a family, in float32, with a tokenizer."""
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder, size=256)
    return folder


def read_log_probs(folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return what transformers' model in a folder predicts at each position of rows of ids, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]


def tokenize(folder: Path) -> tuple[list[int], list[int]]:
    """Return the ids of `TEXT`, and those that the tokenizer puts before a text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer("")["input_ids"][:1]

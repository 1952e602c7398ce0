"""Adapters as peft writes them, on tiny models of transformers, and what peft's own merge makes of them."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_llama(*, seed: int = 0, **more: Any) -> Any:
    """Return a tiny Llama with weights of a useful size."""
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False, **more}
    return fill(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), seed)


def make_qwen(*, seed: int = 0, **more: Any) -> Any:
    """Return a tiny Qwen2, whose attention has biases."""
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True, **more}
    return fill(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)), seed)


def make_gpt2(*, seed: int = 0, **more: Any) -> Any:
    """Return a tiny GPT-2, whose weights are stored transposed; its attention is square, as no shape can tell."""
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, **more}
    return fill(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), seed)


def fill(module: Any, seed: int) -> Any:
    """Return the module with every floating parameter random; ties stay."""
    stream = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=stream) / 4)
    return module


def write_model(module: Any, folder: Path) -> Path:
    """Save a model in float32."""
    module.save_pretrained(folder)
    return folder


def write_adapter(
    module: Any, folder: Path, *, seed: int = 1, change: Callable[[Any], None] | None = None, **config: Any
) -> dict[str, torch.Tensor]:
    """Train (at random) and save an adapter of a model; return the state of the model with it merged in, by peft."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(**settings))
        stream = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                with torch.no_grad():
                    noise = torch.randn(parameter.shape, generator=stream) / 4
                    parameter.copy_(noise.abs() + 0.1 if "magnitude" in name else noise)
        if change is not None:
            change(wrapped)
        wrapped.save_pretrained(folder)
        merged = wrapped.merge_and_unload().state_dict()
    return {name: value.detach().clone() for name, value in merged.items()}


def merge_by_peft(module: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Return the state of a model with a saved adapter merged in, by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(module), folder).merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}

"""Tiny dense models that transformers saves, and mixtures of them: what the tests of mixtures share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import read_tensors, write_tokenizer

from mergemill.engine import make_plan, run

LAYERS, HIDDEN, CHANNELS, HEADS, VOCAB = 2, 32, 48, 4, 256
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}
NAMES = ("a", "b", "c")


def write_dense(folder: Path, kind: str, *, seed: int, **more: Any) -> Path:
    """Save a tiny model of a kind, with weights of a useful size and a tokenizer."""
    import transformers

    stream = torch.Generator().manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**{**_SIZES, **_KINDS[kind], **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=stream) / 8)
    model.save_pretrained(folder)
    write_tokenizer(folder, size=VOCAB)
    return folder


def write_all(folder: Path) -> Path:
    """Save three models of every kind, as ``llama-a``."""
    for kind in _KINDS:
        for seed, name in enumerate(NAMES):
            write_dense(folder / f"{kind}-{name}", kind, seed=seed)
    return folder


def mix(
    recipe: Mapping[str, Any] | Path | str, out: Path, *, seed: int = 0, workers: int = 0
) -> dict[str, torch.Tensor]:
    """Make a mixture, and return its tensors."""
    run(make_plan(recipe, seed=seed), out, workers=workers)
    found = read_tensors(out)
    return {name: value for name, value in found.items() if not name.startswith("layers.")}  # of gates.safetensors


def load(folder: Path) -> Any:
    """Return the model in a folder, loaded by transformers without a missing or unexpected tensor, in float32."""
    import transformers

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


def find_logits(model: Any, *, count: int = 7) -> torch.Tensor:
    """Return the logits of a few tokens."""
    with torch.no_grad():
        return model(torch.arange(3, 3 + count)[None]).logits

"""The demo's models: small Llamas of random numbers, and variants near them, as models tuned from one base are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 4096, 128, 384, 4, 2
NOISE = 0.01  # standard deviation of what a variant adds to its base


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One of them."""

    name: str
    layers: int = 6
    tied: bool = True  # its head to the embedding
    dtype: str = "bfloat16"
    base: str = ""  # the model that it is near; empty: none

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(rows * columns for rows, columns in (_count_both(shape) for _, shape in _list_shapes(self)))


def write_demo_model(folder: Path, model: DemoModel) -> None:
    """Write a checkpoint, unless it is there: the weights last and at once, so that a stopped demo can be run again."""
    import torch
    from safetensors.torch import save_file

    weights = folder / "model.safetensors"
    if weights.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config(model), indent=2) + "\n", encoding="utf-8")
    unfinished = weights.with_suffix(".tmp")
    dtype = getattr(torch, model.dtype)
    stored = {name: tensor.to(dtype) for name, tensor in make_tensors(model)}
    save_file(stored, unfinished, metadata={"format": "pt"})
    unfinished.replace(weights)


def make_tensors(model: DemoModel) -> "Iterator[tuple[str, Tensor]]":
    """Yield float32 values of every tensor: normal ones, or those of the base and a little more."""
    import torch

    for name, shape in _list_shapes(model):
        own = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(f"{model.name} {name}".encode())))
        if model.base:
            base = torch.Generator().manual_seed(crc32(f"{model.base} {name}".encode()))
            own = torch.randn(shape, generator=base).add_(own, alpha=NOISE)
        yield name, own / shape[-1] ** 0.5


def _list_shapes(model: DemoModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    kv_size = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    if not model.tied:
        yield "lm_head.weight", (VOCABULARY, HIDDEN)
    for layer in range(model.layers):
        start = f"model.layers.{layer}"
        for name, size in (("q", HIDDEN), ("k", kv_size), ("v", kv_size), ("o", HIDDEN)):
            yield f"{start}.self_attn.{name}_proj.weight", (size, HIDDEN)
        for name, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            yield f"{start}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def _count_both(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1] if len(shape) > 1 else 1


def make_config(model: DemoModel) -> dict[str, Any]:
    """Return a small Llama's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": model.dtype,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": model.tied,
        "vocab_size": VOCABULARY,
    }

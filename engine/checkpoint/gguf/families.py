"""The families of which GGUF files are read and written: names of tensors, and settings, there and in a config.

What llama.cpp's own converter does with them (``convert_hf_to_gguf.py``): Llama and Mistral are one architecture,
whose queries and keys have the two halves of each head interleaved; Qwen2 and Qwen3 are as they are. Gemma 2 and 3
calculate with 1 and the weight of a norm, and there the sum is stored; their settings are in `gemma.py`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.gguf.gemma import USUAL_BASES, list_gemma
from mergemill.engine.errors import CheckpointError

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<what>\w+)\.(?P<part>weight|bias)")
_LAYER = re.compile(r"model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<what>[\w.]+)\.(?P<part>weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3: made of the config, and stored in no model of Hugging Face
LARGEST_HEAD = 8192  # elements: factors are made one by one


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """One architecture of llama.cpp."""

    architecture: str  # as GGUF calls it
    model_type: str  # as a config does
    class_name: str  # of transformers
    interleaved: bool = False  # whether queries and keys have the halves of each head interleaved
    is_gemma: bool = False  # whether norms follow attention and MLP too, and are stored with 1 added
    has_head: bool = True  # whether a head may be stored

    @property
    def inside(self) -> Mapping[str, str]:
        """What a layer has, by GGUF's names."""
        return _INSIDE | _AROUND if self.is_gemma else _INSIDE


_FAMILIES = (
    GgufFamily("llama", "llama", "LlamaForCausalLM", interleaved=True),
    GgufFamily("llama", "mistral", "MistralForCausalLM", interleaved=True),
    GgufFamily("qwen2", "qwen2", "Qwen2ForCausalLM"),
    GgufFamily("qwen3", "qwen3", "Qwen3ForCausalLM"),
    GgufFamily("gemma2", "gemma2", "Gemma2ForCausalLM", is_gemma=True, has_head=False),
    GgufFamily("gemma3", "gemma3_text", "Gemma3ForCausalLM", is_gemma=True),
)
KNOWN = tuple(family.model_type for family in _FAMILIES)


def find_family(model_type: object, *, where: str) -> GgufFamily:
    """Return the family of a config's ``model_type``; `CheckpointError` for another."""
    for family in _FAMILIES:
        if family.model_type == model_type:
            return family
    raise CheckpointError(
        f"{where}: is of the family {model_type or 'that its config does not name'}, which is not written as GGUF "
        f"here; {', '.join(KNOWN)} are"
    )


def find_architecture(name: object, *, where: str) -> GgufFamily:
    """Return the family of a GGUF file; `CheckpointError` for one that is not read."""
    for family in _FAMILIES:
        if family.architecture == name:
            return family
    known = dict.fromkeys(family.architecture for family in _FAMILIES)
    raise CheckpointError(
        f"{where}: is of the architecture {name!r}, whose names are not known; {', '.join(known)} are"
    )


def from_gguf_name(name: str, family: GgufFamily) -> str | None:
    """Return what Hugging Face calls a tensor of a GGUF file; None for one that it does not store.

    >>> from_gguf_name("blk.3.attn_q.bias", _FAMILIES[0]), from_gguf_name("rope_freqs.weight", _FAMILIES[0])
    ('model.layers.3.self_attn.q_proj.bias', None)
    """
    found = _BLOCK.fullmatch(name)
    if found is None or found["what"] not in family.inside:
        return _OUTSIDE.get(name)
    return f"model.layers.{found['layer']}.{family.inside[found['what']]}.{found['part']}"


def to_gguf_name(name: str, family: GgufFamily) -> str | None:
    """Return what GGUF calls a tensor; None for one that it has no name for.

    >>> to_gguf_name("model.layers.3.mlp.down_proj.weight", _FAMILIES[0]), to_gguf_name("x", _FAMILIES[0])
    ('blk.3.ffn_down.weight', None)
    """
    if name == "lm_head.weight" and not family.has_head:
        return None
    found = _LAYER.fullmatch(name)
    back = {theirs: ours for ours, theirs in family.inside.items()}
    if found is None or found["what"] not in back:
        return next((ours for ours, theirs in _OUTSIDE.items() if theirs == name), None)
    return f"blk.{found['layer']}.{back[found['what']]}.{found['part']}"


def find_shift(name: str, family: GgufFamily) -> float:
    """Return what is added to a tensor (by Hugging Face's name) where it is stored as GGUF."""
    return 1.0 if family.is_gemma and name.endswith("norm.weight") else 0.0


def count_heads(name: str, family: GgufFamily, heads: int, kv_heads: int) -> int:
    """Return how many heads the rows of a tensor (by Hugging Face's name) are interleaved by; 0: they are not."""
    if not family.interleaved:
        return 0
    module = name.rpartition(".")[0]
    return heads if module.endswith(".q_proj") else kv_heads if module.endswith(".k_proj") else 0


def list_settings(config: Mapping[str, Any], family: GgufFamily, *, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a GGUF file that a config has; `CheckpointError` for what it cannot say."""
    counts = {key: _count(config, key, where) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    heads, arch = counts["num_attention_heads"], family.architecture
    head = config.get("head_dim") or counts["hidden_size"] // heads
    if type(head) is not int or head < 2 or head % 2:
        raise CheckpointError(f"{where}: config.json: head_dim is {head!r}, not an even number")
    yield f"{arch}.block_count", counts["num_hidden_layers"]
    yield f"{arch}.context_length", _count(config, "max_position_embeddings", where)
    yield f"{arch}.embedding_length", counts["hidden_size"]
    yield f"{arch}.feed_forward_length", _count(config, "intermediate_size", where)
    yield f"{arch}.attention.head_count", heads
    yield f"{arch}.attention.head_count_kv", config.get("num_key_value_heads") or heads
    yield f"{arch}.attention.layer_norm_rms_epsilon", float(config.get("rms_norm_eps") or 1e-6)
    yield f"{arch}.attention.key_length", head
    yield f"{arch}.attention.value_length", head
    if family.interleaved:
        yield f"{arch}.vocab_size", _count(config, "vocab_size", where)
        yield f"{arch}.rope.dimension_count", head
    if family.is_gemma:
        yield from list_gemma(config, arch, where=where)
    rope = read_rope(config)
    yield f"{arch}.rope.freq_base", float(rope.get("rope_theta") or USUAL_BASES.get(arch, 10000.0))
    yield from _list_scaling(rope, arch, where)


def read_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config says of its rotary embedding, in the words of transformers 5."""
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        whole = rope.get("full_attention")  # of Gemma 3, whose layers with a window have another
        return whole if isinstance(whole, Mapping) else rope
    scaling = config.get("rope_scaling")
    return {"rope_theta": config.get("rope_theta"), **(scaling if isinstance(scaling, Mapping) else {})}


def find_rope_kind(rope: Mapping[str, Any]) -> str:
    """Return how the rotary embedding is scaled."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _list_scaling(rope: Mapping[str, Any], arch: str, where: str) -> Iterator[tuple[str, Any]]:
    kind = find_rope_kind(rope)
    if kind in ("default", "llama3"):  # the factors of llama3 are a tensor
        return
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{where}: config.json: rope_type {kind!r} is not written as GGUF; linear, yarn, llama3 are"
        )
    yield f"{arch}.rope.scaling.type", kind
    yield f"{arch}.rope.scaling.factor", float(rope.get("factor") or 1.0)
    if kind == "yarn" and type(original := rope.get("original_max_position_embeddings")) is int:
        yield f"{arch}.rope.scaling.original_context_length", original


def make_rope_factors(config: Mapping[str, Any], *, where: str) -> tuple[float, ...]:
    """Return what each frequency is divided by in a Llama 3; none where it has no such scaling.

    `CheckpointError` for a head that no model has, which would take for ever.
    """
    rope = read_rope(config)
    if find_rope_kind(rope) != "llama3":
        return ()
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if type(head) is not int or not 0 < head <= LARGEST_HEAD:
        raise CheckpointError(f"{where}: heads of {head!r} elements; those of Llama 3 have at most {LARGEST_HEAD}")
    factor, low, high = (
        float(rope.get(key) or default)
        for key, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    length = float(rope.get("original_max_position_embeddings") or 8192)
    made = []
    for place in range(0, head, 2):
        wave = 2 * math.pi * float(rope.get("rope_theta") or 10000.0) ** (place / head)
        smooth = (length / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        made.append(1.0 if wave < length / high else factor if wave > length / low else between)
    return tuple(made)


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 1 << 32:
        raise CheckpointError(f"{where}: config.json: {key} is {value!r}; a whole number is needed to write GGUF")
    return value

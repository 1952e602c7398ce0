"""A GGUF file as a model of Hugging Face: its tensors by their names there, and a config made of its settings."""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.gguf.families import (
    ROPE_FACTORS,
    GgufFamily,
    count_heads,
    find_architecture,
    find_shift,
    from_gguf_name,
    make_rope_factors,
)
from mergemill.engine.checkpoint.gguf.gemma import USUAL_BASES, make_gemma, make_local_rope
from mergemill.engine.checkpoint.gguf.header import GgufHeader, GgufKind, GgufPlace, parse_gguf
from mergemill.engine.checkpoint.gguf.tokenizer import make_tokenizer
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.ranges import read_into
from mergemill.engine.storage.store import Storage

MOST_FACTORS_BYTES = 4096  # of the one tensor that is read to know the config


@dataclass(frozen=True, slots=True)
class GgufTensorFacts:
    """What is stored under a name, where that is not said by a dtype and a shape alone."""

    kind: GgufKind
    shape: tuple[int, ...]
    heads: int  # that its rows are interleaved by; 0: they are not
    shift: float = 0.0  # that is added to it there


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A file that is known."""

    tensors: Mapping[str, StoredTensor]  # by the names of Hugging Face, in their order
    facts: Mapping[str, GgufTensorFacts]  # of each
    config: Mapping[str, Any]
    left_out: tuple[str, ...]  # what is no weight of the model, in words
    files: Mapping[str, bytes]  # of its tokenizer, where its tokens are known


def open_gguf(pin: Pin, where: str, storage: Storage) -> GgufModel:
    """Return the model in a file; `CheckpointError` for what is none, or of a family whose names are not known."""

    def read(offset_bytes: int, size_bytes: int) -> bytes:
        data = bytearray(size_bytes)
        read_into(pin, offset_bytes, memoryview(data), storage)
        return bytes(data)

    header = parse_gguf(read, pin.size_bytes, where=where)
    if header.settings.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{where}: is one of several files; join them first, with llama.cpp's gguf-split --merge")
    family = find_architecture(header.settings.get("general.architecture"), where=where)
    by_name = {place.name: place for place in header.tensors}
    factors = _read_factors(by_name.pop(ROPE_FACTORS, None), read, where)
    names = {name: from_gguf_name(name, family) for name in by_name}
    if unknown := [name for name, ours in names.items() if ours is None]:
        known = f"is none of {family.architecture}, as far as that is known here"
        raise CheckpointError(f"{where}: tensor {unknown[0]!r} {known}")
    places = {str(names[name]): place for name, place in by_name.items()}
    config = make_config(header, family, places, factors, where)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    facts = {
        name: GgufTensorFacts(
            place.kind, place.shape, count_heads(name, family, heads, kv_heads), find_shift(name, family)
        )
        for name, place in sorted(places.items())
    }
    _check_heads(facts, config, where)
    tensors = {name: _store(name, places[name], pin) for name in facts}
    files = make_tokenizer(header.settings)
    left_out = () if files else (tell_of_tokens(header.settings, where),)
    return GgufModel(tensors, facts, config, left_out, files)


def tell_of_tokens(settings: Mapping[str, Any], where: str) -> str:
    """Return that its tokens are not read, of which kind they are (``t5``, ``bert``, a cut of its own), what to do."""
    kinds = [settings.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    named = " cut as ".join(repr(kind[:40]) for kind in kinds if isinstance(kind, str) and kind)
    said = f" ({named})" if named else ""
    way = "take tokenizer and config of another model for an output that needs them"
    return f"{where}: its tokens{said} are not read: {way}"


def find_kind(facts: Mapping[str, GgufTensorFacts]) -> str:
    """Return the type of most elements of what is quantised; empty where nothing is."""
    sizes: Counter[str] = Counter()
    for each in facts.values():
        if not each.kind.dtype:
            sizes[each.kind.name] += count_elements(each)
    return max(sizes, key=lambda name: (sizes[name], name), default="")


def count_elements(facts: GgufTensorFacts) -> int:
    """Return the elements of a tensor."""
    count = 1
    for size in facts.shape:
        count *= size
    return count


def _store(name: str, place: GgufPlace, pin: Pin) -> StoredTensor:
    """Return where a tensor lies: what is quantised as bytes."""
    plain = place.kind.dtype
    return StoredTensor(
        name, plain or "U8", place.shape if plain else (place.nbytes,), pin, place.offset_bytes, place.nbytes
    )


def make_config(
    header: GgufHeader, family: GgufFamily, places: Mapping[str, GgufPlace], factors: tuple[float, ...], where: str
) -> dict[str, Any]:
    """Return the config that transformers would have for the model."""
    settings, arch = header.settings, family.architecture

    def count(key: str, default: int | None = None) -> int:
        value = settings.get(f"{arch}.{key}", default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CheckpointError(f"{where}: the setting {arch}.{key} is {value!r}, and must be a whole number")
        return value

    def number(key: str, default: float) -> float:
        value = settings.get(f"{arch}.{key}", default)
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise CheckpointError(f"{where}: the setting {arch}.{key} is {value!r}, and must be a number")
        return float(f"{value:.7g}")  # of float32

    hidden, heads = count("embedding_length"), count("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": count("attention.key_length", count("rope.dimension_count", max(1, hidden // heads))),
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "lm_head.weight" not in places,
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base", USUAL_BASES.get(arch, 1e4))},
    }
    embedding = places.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{where}: has no embedding of tokens")
    config["vocab_size"] = embedding.shape[0]
    if any(name.endswith("self_attn.q_proj.bias") for name in places):
        config["attention_bias"] = True
    for key in ("bos", "eos"):
        found = settings.get(f"tokenizer.ggml.{key}_token_id")
        if type(found) is int and 0 <= found < embedding.shape[0]:  # others are ignored, as llama.cpp does
            config[f"{key}_token_id"] = found
    config["rope_parameters"] |= _find_scaling(header, arch, where)
    if family.is_gemma:
        config |= make_gemma(settings, arch, config, number, where=where)
    if arch == "gemma3":
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": make_local_rope(number),
        }
    return _check_factors(config, factors, where)


def _find_scaling(header: GgufHeader, arch: str, where: str) -> dict[str, Any]:
    kind = header.settings.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return {}
    factor = header.settings.get(f"{arch}.rope.scaling.factor")
    if kind not in ("linear", "yarn") or type(factor) is not float:
        said = f"{kind!r}, factor {factor!r}"
        raise CheckpointError(f"{where}: its rotary embedding is scaled by {said}, which is not known")
    original = header.settings.get(f"{arch}.rope.scaling.original_context_length")
    more = {"original_max_position_embeddings": original} if type(original) is int else {}
    return {"rope_type": kind, "factor": factor, **more}


def _check_factors(config: dict[str, Any], factors: tuple[float, ...], where: str) -> dict[str, Any]:
    """Return the config with the scaling of Llama 3 that has these factors; `CheckpointError` where none has."""
    if not factors:
        return config
    llama3 = {"rope_type": "llama3", "factor": float(f"{max(factors):.6g}"), "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = {**config, "rope_parameters": {**config["rope_parameters"], **llama3}}
    made = make_rope_factors(scaled, where=where)
    if len(made) != len(factors) or any(abs(a - b) > 1e-4 * b for a, b in zip(made, factors, strict=True)):
        raise CheckpointError(f"{where}: {ROPE_FACTORS} is not that of a Llama 3, and no config says the same")
    return scaled


def _read_factors(place: GgufPlace | None, read: Any, where: str) -> tuple[float, ...]:
    if place is None:
        return ()
    if place.kind.dtype != "F32" or len(place.shape) != 1 or place.nbytes > MOST_FACTORS_BYTES:
        raise CheckpointError(
            f"{where}: {ROPE_FACTORS} is {place.kind.name} of {list(place.shape)}, no list of factors"
        )
    found = struct.unpack(f"<{place.shape[0]}f", read(place.offset_bytes, place.nbytes))
    if not all(0 < value < 1e6 for value in found):
        raise CheckpointError(f"{where}: {ROPE_FACTORS} holds what is no factor")
    return found


def _check_heads(facts: Mapping[str, GgufTensorFacts], config: Mapping[str, Any], where: str) -> None:
    """Refuse queries and keys that are not as many heads, of as many elements, as the settings say."""
    counts = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, each in facts.items():
        count = counts.get(name.split(".")[-2], 0)
        if count and each.shape and each.shape[0] != count * config["head_dim"]:
            said = f"{count} heads of {config['head_dim']} elements, as its settings say"
            raise CheckpointError(f"{where}: tensor {name} of {list(each.shape)} does not suit {said}")
        if each.heads and (not each.shape or each.shape[0] % (2 * each.heads)):
            raise CheckpointError(f"{where}: tensor {name} of {list(each.shape)} does not suit {each.heads} heads")


def write_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as its file would be."""
    return json.dumps(config, indent=2).encode() + b"\n"

"""Small real checkpoints for tests: Llama weights, config and tokenizer, written without transformers.

Every tensor is drawn from its own stream, keyed by (seed, name), so the same name has the same values
whatever the number of layers, shards or extras. The tokenizer is a byte-level BPE with a few merges.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
EXTRAS = ("integer", "bool", "scalar", "empty")

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- test\n---\n# A small random Llama\n"


def write_llama(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    vocab: int = 256,
    tied: bool = False,
    dtype: str = "bfloat16",
    shards: int = 1,
    near: Path | None = None,
    scale: float = 0.01,
    extras: Collection[str] = (),
    added_tokens: Sequence[str] = (),
) -> Path:
    """Write a Llama checkpoint into `folder` and return it.

    near: a checkpoint with at least these tensors (a missing head is its embedding); the values are then
    its values plus `scale` times heavy-tailed noise, as of a fine-tune. extras: any of `EXTRAS`, odd tensors
    that Llama does not have. added_tokens take the last ids of the vocabulary.
    """
    shapes = llama_shapes(
        layers=layers,
        hidden=hidden,
        kv_size=hidden // heads * kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
    )
    origin = read_origin(near, shapes) if near else {}
    kind = getattr(torch, dtype)
    tensors = {
        name: make_weight(name, shape, seed=seed, near=origin.get(name), scale=scale).to(kind)
        for name, shape in shapes.items()
    }
    tensors |= make_extras(extras, layers=layers, hidden=hidden, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, shards=shards)
    config = make_config(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
        dtype=dtype,
    )
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, size=vocab, added=added_tokens)
    (folder / "README.md").write_text(CARD)
    return folder


def llama_shapes(
    *, layers: int, hidden: int, kv_size: int, intermediate: int, vocab: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Llama, by name, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, intermediate),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv_size, hidden),
    }
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def read_origin(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the tensors of `folder` that a variant with `shapes` starts from."""
    origin = read_tensors(folder)
    origin.setdefault("lm_head.weight", origin["model.embed_tokens.weight"])
    if missing := [name for name in shapes if name not in origin]:
        raise ValueError(f"{folder}: lacks {missing[0]} and {len(missing) - 1} more")
    return origin


def make_weight(
    name: str, shape: tuple[int, ...], *, seed: int, near: torch.Tensor | None = None, scale: float = 0.01
) -> torch.Tensor:
    """Return float64 values for one tensor: small normal ones, norms about 1, or `near` plus noise."""
    stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if near is not None:
        if tuple(near.shape) != shape:
            raise ValueError(f"{name}: is {shape}, but near has {tuple(near.shape)}")
        return near.double() + scale * torch.from_numpy(stream.standard_t(4, shape))
    values: npt.NDArray[np.float64] = stream.standard_normal(shape)
    if len(shape) == 1:
        return torch.from_numpy(1 + 0.1 * values)
    return torch.from_numpy(values / np.sqrt(shape[-1]))


def make_extras(extras: Collection[str], *, layers: int, hidden: int, dtype: str) -> dict[str, torch.Tensor]:
    """Return the odd tensors asked for; they are the same in every model."""
    if unknown := set(extras) - set(EXTRAS):
        raise ValueError(f"unknown extras {sorted(unknown)}; known: {EXTRAS}")
    kind = getattr(torch, dtype)
    tensors: dict[str, torch.Tensor] = {}
    if "integer" in extras:
        tensors |= {f"model.layers.{i}.self_attn.position_ids": torch.arange(16) for i in range(layers)}
    if "bool" in extras:
        tensors["model.causal_mask"] = torch.ones(4, 4).tril().bool()
    if "scalar" in extras:
        tensors["model.logit_scale"] = torch.tensor(0.5, dtype=kind)
    if "empty" in extras:
        tensors["model.unused_tokens"] = torch.zeros(0, hidden, dtype=kind)
    return tensors


def make_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    tied: bool,
    dtype: str,
) -> dict[str, object]:
    """Return a LlamaConfig as JSON, with one key (`x_custom`) that transformers does not know."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": vocab,
        "x_custom": {"kept": [1, 2, 3]},
    }


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """Write `tensors` as one safetensors file, or as `shards` files with an index, in the order given."""
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        held = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, as stored."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_arrays(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Return every floating tensor of a checkpoint as float64, for the oracle."""
    tensors = read_tensors(folder)
    return {name: t.double().numpy() for name, t in tensors.items() if t.is_floating_point()}


def write_tokenizer(folder: Path, *, size: int, added: Sequence[str] = ()) -> None:
    """Write tokenizer.json and tokenizer_config.json with at most `size` tokens, the last of them `added`."""
    specials = [make_added_token(i, token) for i, token in enumerate(SPECIAL_TOKENS)]
    plain: dict[str, int] = {}
    merges: list[list[str]] = []
    for parts in make_pieces():
        if len(plain) == size - len(SPECIAL_TOKENS) - len(added):
            break
        plain["".join(parts)] = len(SPECIAL_TOKENS) + len(plain)
        if len(parts) == 2:
            merges.append(parts)
    first = len(SPECIAL_TOKENS) + len(plain)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials + [make_added_token(first + i, token) for i, token in enumerate(added)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(SPECIAL_TOKENS)} | plain,
            "merges": merges,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    write_json(folder / "tokenizer_config.json", config)


def make_added_token(token_id: int, content: str) -> dict[str, object]:
    """Return one entry of tokenizer.json's `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content} | flags


def make_pieces() -> Iterator[list[str]]:
    """Yield the tokens in the order of their ids: characters ``[c]``, then merges ``[left, right]``."""
    visible = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    yield from ([c] for c in ("Ġ", *visible))
    yield from ([chr(256 + i)] for i in range(68) if chr(256 + i) != "Ġ")
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    yield from ([a, b] for a in ("Ġ", *letters) for b in letters)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

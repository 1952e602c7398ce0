"""Models to measure with: checkpoints of given shapes and dtypes, with random values or as sparse files.

Random: a base of normal values, and models that are the base plus normal noise of a tenth, as fine-tunes are. Sparse:
the data is a hole that reads as zeros and takes no disk. Files are cut as the Hub has them, at 5 GB.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch

Data = Literal["random", "sparse"]
Shapes = Mapping[str, tuple[int, ...]]  # of every tensor, by its name

SHARD_BYTES = 5_000_000_000
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
CHUNK = 1 << 22  # elements that are drawn at once
DEVIATION, NOISE = 0.02, 0.002


@dataclass(frozen=True)
class Llama:
    """The sizes that decide a Llama's tensors."""

    hidden: int
    layers: int
    intermediate: int
    kv_rows: int
    vocabulary: int


LLAMAS = {
    "1MB": Llama(128, 2, 352, 64, 512),
    "tiny": Llama(256, 4, 704, 64, 4096),
    "1.1B": Llama(2048, 22, 5632, 256, 32000),
    "8B": Llama(4096, 32, 14336, 1024, 128256),
    "70B": Llama(8192, 80, 28672, 1024, 128256),
}


def list_shapes(llama: Llama) -> Shapes:
    """Return the shape of every tensor of a Llama, in the order of the model."""
    hidden, wide = llama.hidden, llama.intermediate
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (llama.vocabulary, hidden)}
    for i in range(llama.layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", llama.kv_rows), ("v", llama.kv_rows), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (wide, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (wide, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (llama.vocabulary, hidden)}


def make_config(llama: Llama) -> dict[str, object]:
    """Return the config.json that goes with `list_shapes`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama.hidden,
        "num_hidden_layers": llama.layers,
        "intermediate_size": llama.intermediate,
        "num_attention_heads": llama.hidden // 64,
        "num_key_value_heads": llama.kv_rows // 64,
        "vocab_size": llama.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def count_bytes(shapes: Shapes, dtype: str = "BF16") -> int:
    """Return the bytes of a model's tensors."""
    return ITEM_BYTES[dtype] * sum(math.prod(shape) for shape in shapes.values())


def open_models(folder: Path, dtypes: Mapping[str, str], llama: Llama, data: Data) -> dict[str, Path]:
    """Return models by name, of these dtypes, in `folder`; what is not there yet, or is another one, is made."""
    named = enumerate(dtypes.items())
    return {name: _open_model(folder / name, number, llama, data, dtype) for number, (name, dtype) in named}


def _open_model(folder: Path, number: int, llama: Llama, data: Data, dtype: str) -> Path:
    made = folder.with_name(f"{folder.name}.made.json")
    wanted = json.dumps({"llama": asdict(llama), "data": data, "number": number, "dtype": dtype})
    if not made.exists() or made.read_text() != wanted:
        made.unlink(missing_ok=True)
        shapes, config = list_shapes(llama), make_config(llama)
        write_model(folder, shapes, number=number, data=data, config=config, dtype=dtype)
        made.write_text(wanted)
    return folder


def write_model(
    folder: Path, shapes: Shapes, *, number: int, data: Data, config: Mapping[str, object], dtype: str = "BF16"
) -> None:
    """Write a checkpoint; number: 0 is the base, the others are near it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*"):
        old.unlink()
    shards = list(_cut_shards(shapes, dtype))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, number, data, dtype)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": count_bytes(shapes, dtype)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def _cut_shards(shapes: Shapes, dtype: str) -> Iterator[Shapes]:
    held: dict[str, tuple[int, ...]] = {}
    held_bytes = 0
    for name, shape in shapes.items():
        size_bytes = ITEM_BYTES[dtype] * math.prod(shape)
        if held and held_bytes + size_bytes > SHARD_BYTES:
            yield held
            held, held_bytes = {}, 0
        held[name] = shape
        held_bytes += size_bytes
    yield held


def _write_shard(path: Path, shapes: Shapes, number: int, data: Data, dtype: str) -> None:
    header = make_header(shapes, dtype)
    with path.open("wb") as file:
        file.write(header)
        if data == "sparse":
            file.truncate(len(header) + count_bytes(shapes, dtype))
            return
        for name, shape in shapes.items():
            _write_values(file, name, math.prod(shape), number, KINDS[dtype])


def make_header(shapes: Shapes, dtype: str = "BF16") -> bytes:
    """Return the header of a safetensors file whose tensors lie in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for name, shape in shapes.items():
        stop_bytes = offset_bytes + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset_bytes, stop_bytes)}
        offset_bytes = stop_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, name: str, size: int, number: int, kind: torch.dtype) -> None:
    key = zlib.crc32(name.encode()) << 8
    base, own = (torch.Generator().manual_seed(key + seed) for seed in (0, number))
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        values = torch.empty(count).normal_(0, DEVIATION, generator=base)
        if number:
            values += torch.empty(count).normal_(0, NOISE, generator=own)
        file.write(values.to(kind).view(torch.uint8).numpy())

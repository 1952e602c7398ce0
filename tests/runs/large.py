"""Models that fill a promise: tensors as large as parts get."""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import make_config, write_json

HIDDEN, WIDE = 4096, 3840  # matrices of 30 MiB


def write_large(folder: Path, seed: int, *, vocab: int, layers: int) -> None:
    """Write a model whose values repeat every 64 MiB: random enough for masks and ranks, and quickly made."""
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (WIDE, HIDDEN) for i in range(layers)}
    shapes |= {f"model.layers.{i}.input_layernorm.weight": (HIDDEN,) for i in range(layers)}
    write_repeated(folder, shapes, seed)
    config = make_config(
        layers=layers,
        hidden=HIDDEN,
        heads=32,
        kv_heads=32,
        intermediate=WIDE,
        vocab=vocab,
        tied=True,
        dtype="bfloat16",
    )
    write_json(folder / "config.json", config)


def write_repeated(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> int:
    """Write tensors of bfloat16 in a new folder, whose values repeat every 64 MiB; return their bytes."""
    folder.mkdir(parents=True)
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(seed)
    block = (0.02 * torch.randn(1 << 25)).bfloat16().view(torch.uint8).numpy()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(block)):
            file.write(memoryview(block)[: offset - start])
    return offset


@contextmanager
def lend_models(folder: Path, *, vocab: int, layers: int, disk_bytes: int) -> Iterator[Path]:
    """Write three models, ``base``, ``A`` and ``B``, and remove them afterwards; skips without so much free disk."""
    if shutil.disk_usage(folder).free < disk_bytes:
        pytest.skip(f"needs {disk_bytes >> 30} GiB of disk in {folder}")
    for seed, name in enumerate(("base", "A", "B")):
        write_large(folder / name, seed, vocab=vocab, layers=layers)
    yield folder
    shutil.rmtree(folder)

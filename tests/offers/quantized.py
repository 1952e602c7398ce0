"""What tests of quantised formats share: models whose matrices are quantised, and what an offer of one of them gives.

An offer is read in spans of any size, in a workspace of just as many bytes as it says that it takes, with and without
the native loops; all must agree to the bit.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from models import write_json
from safetensors.torch import save_file

from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.family import choose_family
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.offer import Offers
from mergemill.engine.tensors import native
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned

NAME = "model.layers.0.mlp.up_proj.weight"
STEM = NAME.removesuffix(".weight")
Tensors = Mapping[str, torch.Tensor]


def write_model(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write a model of one layer with `tensors` and two that are never quantised."""
    folder.mkdir(parents=True)
    plain = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16), "lm_head.weight": torch.ones(4, 8).bfloat16()}
    contiguous = {name: tensor.contiguous() for name, tensor in {**plain, **tensors}.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"model_type": "llama", "dtype": "bfloat16", "num_hidden_layers": 1, **config})
    return folder


def offers_of(folder: Path) -> Offers:
    checkpoint = open_checkpoint(str(folder))
    return open_offers({"model": checkpoint}, choose_family(checkpoint.config), {})["model"]


def read_offer(folder: Path, name: str = NAME, dtype: str = "F32") -> torch.Tensor:
    """Return what is offered for a tensor, after every way of reading it has given the same bits."""
    expression = offers_of(folder)[name].expression
    found = [read_expression(expression, dtype, step) for step in (expression.size, 1 + expression.size // 3, 77)]
    with without_native():
        found.append(read_expression(expression, dtype, 1 + expression.size // 2))
    for other in found[1:]:
        assert torch.equal(as_words(other), as_words(found[0])), "spans, or loops, show in the bits"
    return found[0].view(expression.shape)


def read_expression(expression: Expression, dtype: str, step: int) -> torch.Tensor:
    """Return all of an expression, read in spans of `step` elements with no more memory than it says."""
    pieces, whole = [], Span(0, expression.size)
    held = list(expression.holds(whole))
    most_bytes = sum(read.size_bytes for read in held)
    arena = np.zeros(
        sum(aligned(read.size_bytes) for read in held) + aligned(expression.slab_bytes(step, dtype)), np.uint8
    )
    with Workspace(arena) as work:
        for read in held:
            work.hold(read.pin, read.offset_bytes, read.size_bytes)
        for start in range(0, expression.size, step):
            work.next_slab()
            span = Span(start, min(start + step, expression.size))
            most_bytes += sum(read.size_bytes for read in expression.reads(span))
            pieces.append(expression.get_ready(()).slab(span, work, dtype).clone())
    assert work.read_bytes <= most_bytes, "what is held is read once"
    return torch.cat(pieces)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the bit, but for which NaN it is."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    nan = torch.isnan(found)
    assert torch.equal(nan, torch.isnan(wanted))
    assert torch.equal(as_words(found.masked_fill(nan, 0)), as_words(wanted.masked_fill(nan, 0)))


def make_values(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def make_bytes(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def make_fp8(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Return FP8 values, every code but NaN among them."""
    codes = make_bytes(*shape, seed=seed)
    return torch.where(codes % 128 >= 124, codes - 60, codes).to(torch.uint8).view(dtype)


@contextmanager
def without_native() -> Iterator[None]:
    with patch.dict(os.environ, MERGEMILL_NATIVE="0"):
        native.load.cache_clear()
        try:
            yield
        finally:
            native.load.cache_clear()
    native.load.cache_clear()

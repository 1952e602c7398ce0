"""Blocks of llama.cpp's quantised types as an expression: dequantised by the package `gguf`, slab by slab."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Leaf, Read, Stored
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import Plain
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, tensor_of

BESIDE = 40  # bytes that the package takes for an element while it dequantises
ROW = 2048  # elements of what the package is told is a row: it takes 16 at once, for one block as long as for these


@dataclass(frozen=True, slots=True)
class Blocks(Leaf):
    """A tensor of which so many elements, one after the other, are one block of bytes."""

    stored: Stored  # as U8
    kind: str  # as the package calls the type
    block_elements: int
    block_bytes: int
    shape: tuple[int, ...]
    dtype: str  # that a loader gives it

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the blocks of the span."""
        first, last = self._find_blocks(span)
        yield from self.stored.reads(Span(first * self.block_bytes, last * self.block_bytes))

    def suits_device(self, device: str) -> bool:
        """It is made on the CPU, and so is what is merged with it."""
        return False

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`: none are stored so."""
        return Plain.encode(self, span, work, dtype, watch)

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span dequantised, and cast to `dtype`."""
        (wanted,) = self.reads(span)
        raw = work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)
        made = work.take_bytes(4 * span.size)
        if span.size:
            first = self._find_blocks(span)[0] * self.block_elements
            found = dequantize(raw.reshape(-1, self.block_bytes), self.kind, ROW // self.block_elements)
            made.view(np.float32)[:] = found[span.start - first : span.stop - first]
        return tensor_of(made).view(torch.float32) if dtype == "F32" else work.decode(tensor_of(made), "F32", dtype)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Blocks, float32, the cast, and what the package takes."""
        whole = elements + 2 * self.block_elements
        blocks = aligned(whole // self.block_elements * self.block_bytes)
        return blocks + aligned(4 * elements) + aligned(elements * item_bytes(dtype)) + BESIDE * whole

    def describe(self) -> Mapping[str, Any]:
        """What is stored, and its type."""
        return {"blocks": self.stored.describe(), "kind": self.kind, "shape": list(self.shape)}

    def _find_blocks(self, span: Span) -> tuple[int, int]:
        return span.start // self.block_elements, -(-span.stop // self.block_elements)


def dequantize(
    blocks: np.ndarray[Any, np.dtype[np.uint8]], kind: str, row: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return blocks ``[n, bytes]`` as float32, flattened, `row` of them a row; `RunError` without the package."""
    try:
        import gguf
    except ImportError as error:
        raise RunError("quantised GGUF files are read with the package gguf: pip install mergemill[gguf]") from error
    in_rows, made = len(blocks) // row * row, []
    with np.errstate(all="ignore"):
        for some in (blocks[:in_rows].reshape(-1, row * blocks.shape[1]), blocks[in_rows:].reshape(1, -1)):
            if some.size:
                made.append(gguf.quants.dequantize(some, gguf.GGMLQuantizationType[kind]).reshape(-1))
    return np.concatenate(made)

"""Blocks of llama.cpp's quantised types as an expression, dequantised slab by slab.

By a native loop for the types that most files have, else by the package `gguf`, with the same bits. The package takes
10 to 28 ns an element, the loop 0.4 to 2.3, and a whole merge 3 (2026-11-30).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.tensors import native
from mergemill.engine.tensors.dequantized import Decoded
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Read, Stored
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.stored import call_checked
from mergemill.engine.tensors.workspace import Workspace, aligned

# In the order of the loop.
NATIVE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
BESIDE = 40  # bytes that the package takes for an element while it dequantises
ROW = 2048  # elements of what the package is told is a row: it takes 16 at once, for one block as long as for these


@dataclass(frozen=True, slots=True)
class Blocks(Decoded):
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

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Blocks, float32, the cast, and what the package takes."""
        whole = elements + 2 * self.block_elements
        blocks = aligned(whole // self.block_elements * self.block_bytes)
        beside = 0 if self._is_native else BESIDE * whole
        return blocks + aligned(4 * elements) + aligned(elements * item_bytes(dtype)) + beside

    @property
    def _is_native(self) -> bool:
        return self.kind in NATIVE and native.load() is not None

    def describe(self) -> Mapping[str, Any]:
        """What is stored, and its type."""
        return {"blocks": self.stored.describe(), "kind": self.kind, "shape": list(self.shape)}

    def _fill(self, span: Span, work: Workspace, out: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        (wanted,) = self.reads(span)
        raw = work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)
        skipped = span.start % self.block_elements
        if self._is_native:
            given = (raw.ctypes.data, raw.size, skipped, span.size, out.ctypes.data)
            call_checked("decode_blocks", NATIVE.index(self.kind), *given)
            return
        found = dequantize(raw.reshape(-1, self.block_bytes), self.kind, ROW // self.block_elements)
        out[:] = found[skipped : skipped + span.size]

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

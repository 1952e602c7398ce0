"""Rows of float32 to codes and scales, as output files have them; rounding is to nearest, ties to even.

Each takes whole rows ``[rows, columns]`` and gives the bytes of codes and those of scales, as the file has them. What
is not finite stays so where the format can say it, and makes its whole block so.

* ``fp8_block`` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2): E4M3 in blocks of 128 rows and 128 columns; the scale
  of a block is its largest magnitude over 448, in float32, so nothing saturates. The error of an element is at most
  ``2^-4`` of itself, and ``2^-10`` scales where it is small.
* ``mxfp4`` (OCP Microscaling 1.0, section 6.3): E2M1 in blocks of 32 columns; the scale is the power of 2 of the
  largest magnitude's exponent, less 2, so the largest code, 6, stands for all from 5 to 8 scales. The error is at
  most a quarter of an element, and a quarter of a scale where it is small.
* ``q8_0`` (llama.cpp, ``quantize_row_q8_0_ref``): 32 columns to a float16 scale, the largest magnitude over 127, and
  32 whole numbers, all in one. Halves are rounded away from zero, as there. The error is at most half a scale, beside
  the scale's own rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.lazy import Tensor, torch

_FP8_BLOCK, _FP8_MOST = 128, 448.0
_MX_BLOCK = 32
_Q8_BLOCK, _Q8_BYTES = 32, 34
_E2M1_LOW = (0.25, 1.25, 2.5, 5.0)  # halfway between two codes: the lower one is even
_E2M1_HIGH = (0.75, 1.75, 3.5)  # the higher one is


class _Make(Protocol):
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes of codes and of scales of ``[rows, columns]``, which is overwritten."""


@dataclass(frozen=True, slots=True)
class Coding:
    """One way to write rows of numbers."""

    make: _Make
    band_rows: int  # that share scales
    columns: int  # a row has a multiple of these
    code_bytes: tuple[int, int]  # bytes, for so many columns
    scale_bytes: tuple[int, int]  # bytes of the scales of a band, for so many columns, the last of which may be fewer
    beside: int  # bytes that making an element takes beside its float32

    def row_bytes(self, columns: int) -> int:
        """Return the size of the codes of a row."""
        return columns // self.code_bytes[1] * self.code_bytes[0]

    def band_bytes(self, columns: int) -> int:
        """Return the size of the scales of a band."""
        return -(-columns // self.scale_bytes[1]) * self.scale_bytes[0]


def _make_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    count, columns = rows.shape
    down, across = -(-count // _FP8_BLOCK), -(-columns // _FP8_BLOCK)
    filled = torch.zeros(down * _FP8_BLOCK, across * _FP8_BLOCK)
    filled[:count, :columns] = rows
    blocks = filled.view(down, _FP8_BLOCK, across, _FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)) / _FP8_MOST
    scales = torch.where(scales == 0, torch.ones(()), scales)
    # A largest magnitude over its scale may come out as a little more than 448.
    blocks /= scales[:, None, :, None]
    codes = blocks.clamp_(-_FP8_MOST, _FP8_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.view(filled.shape)[:count, :columns].reshape(-1), scales.view(-1).view(torch.uint8)


def _make_mxfp4(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = rows.view(-1, _MX_BLOCK)
    most = blocks.abs().amax(1)
    exponents = torch.frexp(most).exponent.clamp_(-124, 130) - 3  # frexp's mantissa is below 1: floor(log2) is one less
    blocks = torch.ldexp(blocks, -exponents[:, None])
    magnitudes = blocks.abs()
    codes = torch.zeros(blocks.shape, dtype=torch.uint8)
    for low in _E2M1_LOW:
        codes += magnitudes > low
    for high in _E2M1_HIGH:
        codes += magnitudes >= high
    codes |= torch.signbit(blocks).to(torch.uint8) << 3
    pairs = codes.view(-1, 2)
    scales = torch.where(most.isfinite(), exponents + 127, 255).to(torch.uint8)
    return pairs[:, 0] | pairs[:, 1] << 4, scales


def _make_q8_0(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = rows.view(-1, _Q8_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    blocks = blocks * torch.where(scales == 0, scales, 1 / scales)
    codes = torch.where(blocks < 0, torch.ceil(blocks - 0.5), torch.floor(blocks + 0.5)).to(torch.int8)
    made = torch.empty(len(blocks), _Q8_BYTES, dtype=torch.uint8)
    made[:, :2] = scales.to(torch.float16).view(torch.uint8)
    made[:, 2:] = codes.view(torch.uint8)
    return made.view(-1), torch.empty(0, dtype=torch.uint8)


def _cast(dtype: str) -> Coding:
    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.to(TORCH_DTYPES[dtype]).view(torch.uint8).view(-1), torch.empty(0, dtype=torch.uint8)

    item = TORCH_DTYPES[dtype].itemsize
    return Coding(make, 1, 1, (item, 1), (0, 1), item)


def find_coding(name: str) -> Coding:
    """Return the coding of a name: one of `CODINGS`, or a dtype, to which elements are cast."""
    return CODINGS[name] if name in CODINGS else _cast(name)


CODINGS: Mapping[str, Coding] = {
    "fp8_block": Coding(_make_fp8, _FP8_BLOCK, 4, (1, 1), (4, _FP8_BLOCK), 10),
    "mxfp4": Coding(_make_mxfp4, 1, _MX_BLOCK, (_MX_BLOCK // 2, _MX_BLOCK), (1, _MX_BLOCK), 14),
    "q8_0": Coding(_make_q8_0, 1, _Q8_BLOCK, (_Q8_BYTES, _Q8_BLOCK), (0, 1), 18),
}

"""Floats as unsigned integers of the same order, their keys: whole, or digit by digit.

Non-negative floats order as their bit patterns do, and so do all once the negative ones have their bits turned.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import is_on_host, to_host
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, item_bytes
from mergemill.engine.tensors.lazy import Tensor, torch

Counts = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[Any]]  # uint32 of float32, uint64 of float64


class Digits:
    """How floats become unsigned integers of the same order, and split into digits of at most 16 bits."""

    def __init__(self, dtype: str, signed: bool) -> None:
        self._dtype = dtype
        self._integer = "I64" if dtype == "F64" else "I32"
        self._unsigned = np.dtype(np.uint64 if dtype == "F64" else np.uint32)
        self._sign = 8 * item_bytes(dtype) - 1  # the highest bit's number
        self._signed = signed
        self.widths = (16 if signed else 15,) + (16,) * (item_bytes(dtype) // 2 - 1)

    def order(self, values: Tensor) -> Tensor:
        """Return signed integers of the same order as the `values`, which are overwritten.

        Without a sign they are the bits of the magnitudes, as the native loops have them: what is no number may have
        its sign set, by the machine that made it, and is the largest all the same.
        """
        if not self._signed:
            return values.view(TORCH_DTYPES[self._integer]).bitwise_and_(self._magnitude)
        # The sum makes -0 the 0 that it equals; which NaN came of an operation is the machine's to say: all are least.
        values.add_(0.0).nan_to_num_(-math.nan, math.inf, -math.inf)
        bits = values.view(TORCH_DTYPES[self._integer])
        return bits.bitwise_xor_((bits >> self._sign).bitwise_and_(self._magnitude))

    def value(self, key: int) -> float:
        """Return the float of an unsigned integer."""
        bits = key - self._bias
        if bits < 0:
            bits ^= self._magnitude
        integer, real = ("<q", "<d") if self._dtype == "F64" else ("<i", "<f")
        value: float = struct.unpack(real, struct.pack(integer, bits))[0]
        return value

    def count_first(self, ordered: Tensor) -> Counts:
        """Count the most significant digit; `ordered` is overwritten."""
        shift = sum(self.widths[1:])
        if native.suits_integers(ordered):
            return native.count_first(ordered, self._bias, shift, 1 << self.widths[0])
        digit = ordered.bitwise_right_shift_(shift)
        if self._signed:
            digit.add_(self._bias >> shift)
        counts: Counts = to_host(torch.bincount(digit, minlength=1 << self.widths[0]))
        return counts

    def count_within(self, ordered: Tensor, level: int, prefixes: Sequence[int]) -> Iterator[Counts]:
        """For each of the prefixes count the digit `level` of the elements whose higher digits it is.

        `ordered` is overwritten.
        """
        shift = sum(self.widths[level + 1 :])
        span = 1 << (shift + self.widths[level])
        if native.suits_integers(ordered):
            yield from (native.count_within(ordered, prefix * span - self._bias, span, shift) for prefix in prefixes)
            return
        if not is_on_host(ordered):
            yield from (self._count_there(ordered, prefix * span - self._bias, span, shift) for prefix in prefixes)
            return
        beyond, least = ordered.numpy().view(self._unsigned), self._bias
        for prefix in prefixes:
            # In place less the least key that begins with the prefix; what is less than that wraps around.
            beyond -= self._unsigned.type((prefix * span - least) % (2 << self._sign))
            least = prefix * span
            inside = beyond[beyond < span] >> self._unsigned.type(shift)
            yield np.bincount(inside.astype(np.int64), minlength=span >> shift)

    def keys(self, values: Tensor) -> Keys:
        """Return each value's key; the `values` are overwritten."""
        return self.to_keys(self.order(values))

    def to_keys(self, ordered: Tensor) -> Keys:
        """Return the keys of what `order` returned, which is overwritten where it lies on the host."""
        keys: Keys = to_host(ordered).view(self._unsigned)
        return np.add(keys, self._unsigned.type(self._bias), out=keys) if self._bias else keys

    def from_key(self, key: int) -> int:
        """Return the integer of `order` that has this key."""
        return key - self._bias

    def _count_there(self, ordered: Tensor, least: int, span: int, shift: int) -> Counts:
        """Count on a device the digit at `shift` of what lies less than `span` above `least`."""
        inside = ordered[(ordered >= least) & (ordered <= least + span - 1)]
        digit = inside.sub_(least).bitwise_right_shift_(shift)
        counts: Counts = to_host(torch.bincount(digit, minlength=span >> shift))
        return counts

    @property
    def most(self) -> int:
        """No key is larger."""
        return (1 << self._sign) - 1 + self._bias

    @property
    def are_single(self) -> bool:
        """Whether they are of float32: all that native loops know."""
        return self._dtype == "F32"

    @property
    def signed(self) -> bool:
        """Whether there are negative values."""
        return self._signed

    @property
    def _magnitude(self) -> int:
        return (1 << self._sign) - 1

    @property
    def _bias(self) -> int:
        """What makes the ordered integers unsigned."""
        return 1 << self._sign if self._signed else 0

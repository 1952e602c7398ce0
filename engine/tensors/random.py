"""Random numbers keyed by position (seed, model, output tensor, element), never by the order of execution.

Each block of 65,536 elements gets two 32-bit keys from BLAKE2b; inside the block, element j's number is an integer hash
of j and the keys. The hash is Chris Wellons' "lowbias32" family (multiply, xor, shift; constants of the
hash-prospector project, public domain), applied twice with a key before each. Only 32-bit integer operations, so every
machine and device gives the same bits.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import is_on_host, put_beside
from mergemill.engine.tensors.fusion import Limits
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK

Doubles = np.ndarray[Any, np.dtype[np.float64]]

Keys = np.ndarray[Any, np.dtype[np.uint32]]

_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97


def keep_with_probability(place: Place, model: int, probability: float, out: Tensor) -> Tensor:
    """Fill `out` with 1 where an element is kept, with `probability`, else 0.

    `out` is a flat floating slab that begins at ``place.start``; `model` is the input's place in the recipe.
    """
    limit = find_limit(probability)
    for start, bits in _iterate_bits(place, model, out):
        torch.lt(bits, limit, out=out[start : start + len(bits)])
    return out


def drop_with_probability(slab: Tensor, place: Place, model: int, probability: float) -> Tensor:
    """Multiply by 0, in place, what is not kept with `probability`: as `keep_with_probability` says."""
    if not native.suits(slab):
        return slab.mul_(keep_with_probability(place, model, probability, torch.empty_like(slab)))
    for start, block, counters in _iterate_counters(place, len(slab)):
        first, second = _block_keys(place.seed, model, place.tensor, block)
        here = slab[start : start + len(counters)]
        native.keep_random(here, counters, first, second, find_limit(probability))
    return slab


def keep_under_limits(place: Place, model: int, limits: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with 1 where an element's random number is under its own of the int32 `limits`, else 0.

    Both are flat slabs that begin at ``place.start``; `random_limits` makes limits of probabilities.
    """
    for start, bits in _iterate_bits(place, model, out):
        stop = start + len(bits)
        torch.lt(bits, limits[start:stop], out=out[start:stop])
    return out


def draw_uniform(place: Place, model: int, out: Tensor) -> Tensor:
    """Fill the flat float64 slab `out`, which begins at ``place.start``, with uniform numbers between 0 and 1.

    Each is the middle of one of 2**32 equal steps, so that neither end comes.
    """
    for start, bits in _iterate_bits(place, model, out):
        out[start : start + len(bits)].copy_(bits)
    return out.add_(2.0**31 + 0.5).mul_(2.0**-32)


def random_limits(probabilities: Doubles) -> Limits:
    """Return the int32 under each of which a uniform int32 lies with the probability.

    >>> random_limits(np.array([0.0, 0.5, 1.0])).tolist()
    [-2147483648, 0, 2147483647]
    """
    steps = np.clip(probabilities * 2.0**32, 0.0, 2.0**32 - 1).astype(np.int64)
    return (steps - 2**31).astype(np.int32)


def random_bits(place: Place, model: int, block: int) -> Tensor:
    """Return the 65,536 uniform int32 of one block."""
    bits, scratch = torch.empty(BLOCK, dtype=torch.int32), torch.empty(BLOCK, dtype=torch.int32)
    return _fill_bits(place, model, block, _mixed_counters(), bits, scratch)


def find_keys(place: Place, model: int, size: int) -> Keys:
    """Return the two keys of each block that the `size` elements from ``place.start`` on touch: ``[block, 2]``."""
    blocks = range(place.start // BLOCK, -(-(place.start + size) // BLOCK))
    return np.array([_block_keys(place.seed, model, place.tensor, block) for block in blocks], np.int32).view(np.uint32)


def _iterate_bits(place: Place, model: int, slab: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the numbers of the slab's elements, from ``place.start`` on, by pieces: where in the slab, and which."""
    size = len(slab)
    if not is_on_host(slab):
        yield 0, _bits_there(place, model, slab)
        return
    bits, scratch = torch.empty(BLOCK, dtype=torch.int32), torch.empty(BLOCK, dtype=torch.int32)
    for start, block, counters in _iterate_counters(place, size):
        count = len(counters)
        yield start, _fill_bits(place, model, block, counters, bits[:count], scratch[:count])


def _iterate_counters(place: Place, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield for each block that the slab touches where in the slab, which block, and the counters of its elements."""
    first, last = place.start // BLOCK, -(-(place.start + size) // BLOCK)
    for block in range(first, last):
        start, stop = max(place.start, block * BLOCK), min(place.start + size, (block + 1) * BLOCK)
        yield start - place.start, block, _mixed_counters()[start - block * BLOCK : stop - block * BLOCK]


def find_limit(probability: float) -> int:
    """Return the int32 under which a uniform int32 lies with the probability."""
    return min(int(probability * 2**32), 2**32 - 1) - 2**31


def _fill_bits(place: Place, model: int, block: int, counters: Tensor, bits: Tensor, scratch: Tensor) -> Tensor:
    first, second = _block_keys(place.seed, model, place.tensor, block)
    return _mix(torch.bitwise_xor(counters, first, out=bits), second, scratch)


def _bits_there(place: Place, model: int, slab: Tensor) -> Tensor:
    """Return the numbers of all the slab's elements, made where it lies."""
    keys = put_beside(find_keys(place, model, len(slab)).view(np.int32), slab)
    bits = put_beside(_mixed_counters().numpy(), slab).bitwise_xor(keys[:, :1])
    skipped = place.start % BLOCK
    return _mix(bits, keys[:, 1:], torch.empty_like(bits)).view(-1)[skipped : skipped + len(slab)]


def _mix(bits: Tensor, second: Tensor | int, scratch: Tensor) -> Tensor:
    _xor_shifted(bits, 16, scratch)
    bits.mul_(_signed(_FIRST)).add_(second)
    _xor_shifted(bits, 15, scratch)
    bits.mul_(_signed(_SECOND))
    _xor_shifted(bits, 15, scratch)
    return bits


def _block_keys(seed: int, model: int, tensor: str, block: int) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}\0{model}\0{block}\0{tensor}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


@functools.cache
def _mixed_counters() -> Tensor:
    counters = torch.arange(BLOCK, dtype=torch.int32)
    scratch = torch.empty_like(counters)
    for shift, factor in ((16, _FIRST), (15, _SECOND)):
        _xor_shifted(counters, shift, scratch)
        counters.mul_(_signed(factor))
    _xor_shifted(counters, 15, scratch)
    return counters


def _xor_shifted(bits: Tensor, shift: int, scratch: Tensor) -> None:
    torch.bitwise_right_shift(bits, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)  # torch shifts in the sign; a hash must not
    bits.bitwise_xor_(scratch)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value

"""Which elements a random method keeps: a second implementation in NumPy, from the words of the engine's."""

import hashlib

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16
FIRST, SECOND = np.uint32(0x21F0AAAD), np.uint32(0xD35A2D97)

Words = npt.NDArray[np.uint32]


def random_words(*, seed: int, model: int, tensor: str, block: int) -> Words:
    """Return the block's 65,536 numbers, as unsigned."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{block}\0{tensor}".encode(), digest_size=8).digest()
    first, second = np.frombuffer(digest, "<u4")
    words = hash_twice(np.arange(BLOCK, dtype=np.uint32), np.uint32(0))
    return hash_twice(words ^ first, second)


def hash_twice(words: Words, key: np.uint32) -> Words:
    """Multiply, xor, shift; `key` is added between."""
    words = words ^ (words >> np.uint32(16))
    words = words * FIRST + key
    words = words ^ (words >> np.uint32(15))
    words = words * SECOND
    return words ^ (words >> np.uint32(15))


def random_mask(
    size: int, density: float | npt.NDArray[np.float64], *, seed: int, model: int, tensor: str
) -> npt.NDArray[np.bool_]:
    """Return which of `size` elements stay, each with the one density or its own; ends of the range are whole."""
    blocks = range(-(-size // BLOCK))
    words = [random_words(seed=seed, model=model, tensor=tensor, block=block) for block in blocks]
    signed = np.concatenate(words).view(np.int32).astype(np.int64)[:size]
    return signed + 2**31 < np.floor(np.asarray(density) * 2**32)

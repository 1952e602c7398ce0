"""How tensors lie in a safetensors file: their sizes, their order, and the header that says so.

Format: https://huggingface.co/docs/safetensors#format, and safetensors 0.8.0 for what it leaves open:
the dtypes below a byte, the order of the writer. A file is 8 bytes of length N (little-endian), N bytes of
JSON, the data. The data has no holes: offsets follow from dtypes and shapes, so a `TensorInfo` carries none.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from mergemill.engine.errors import HeaderError

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

# In the order of safetensors' own enumeration: its writer puts later dtypes first.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    name: str
    dtype: str  # the format's name: a key of `DTYPE_BITS`
    shape: tuple[int, ...]  # elements along each axis; () is a scalar

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def file_order(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return `tensors` in the order in which ``safetensors.torch.save_file`` writes them: dtype, then name.

    >>> a, b, c = TensorInfo("a", "F16", ()), TensorInfo("b", "F16", ()), TensorInfo("c", "F32", ())
    >>> [tensor.name for tensor in file_order([b, a, c])]
    ['c', 'a', 'b']
    """
    return tuple(sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name)))


def make_offsets(tensors: Iterable[TensorInfo], first_bytes: int = 0) -> tuple[int, ...]:
    """Return where the data of each tensor begins when that of the first begins at `first_bytes`.

    >>> make_offsets([TensorInfo("a", "F32", (3,)), TensorInfo("b", "U8", ())], 100)
    (100, 112)
    """
    return tuple(accumulate((tensor.nbytes for tensor in tensors), initial=first_bytes))[:-1]


def make_header(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str], *, align_bytes: int = LENGTH_BYTES
) -> bytes:
    """Return all of a file that goes before its data: length, JSON, and spaces up to `align_bytes`.

    The data lie in the order of `tensors`. With `file_order` and at most one entry of metadata the bytes are
    those of ``safetensors.torch.save_file`` (which writes several entries in a random order; here they are
    sorted). Raises `HeaderError` for what could not be read back.
    """
    _check_writable(tensors)
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    bounds = accumulate((tensor.nbytes for tensor in tensors), initial=0)
    for tensor, offsets in zip(tensors, pairwise(bounds), strict=True):
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = _encode(fields)
    text += b" " * (-(LENGTH_BYTES + len(text)) % align_bytes)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderError(f"new header: {len(text)} bytes; the format allows {MAX_HEADER_BYTES}; write more shards")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def count_bytes(tensor: TensorInfo) -> int | None:
    """Return the size of the data; None where it is no whole number of bytes, or overflows 64 bits on the way."""
    bits = _count_bits(tensor.dtype, tensor.shape)
    return None if bits is None or bits % 8 else bits // 8


def check_size(tensor: TensorInfo, where: str) -> None:
    """Raise `HeaderError` unless the data are a whole number of bytes that 64 bits can count."""
    bits = _count_bits(tensor.dtype, tensor.shape)
    if bits is None:
        raise HeaderError(f"{where} overflows: {tensor.dtype} {list(tensor.shape)} counts 2^64 or more")
    if bits % 8:
        raise HeaderError(f"{where} is {tensor.dtype} {list(tensor.shape)}: {bits} bits, not a whole number of bytes")


@functools.lru_cache(maxsize=1024)  # the tensors of a model are of few kinds
def _count_bits(dtype: str, shape: tuple[int, ...]) -> int | None:
    # Step by step, as safetensors multiplies: a zero that comes later does not undo an overflow.
    count = 1
    for length in (*shape, DTYPE_BITS[dtype]):
        count *= length
        if count >= 2**64:
            return None
    return count


def _check_writable(tensors: Sequence[TensorInfo]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names or tensor.name == "__metadata__":
            raise HeaderError(f"new header: tensor name {tensor.name!r} is taken")
        names.add(tensor.name)
        if count_bytes(tensor) is None:
            check_size(tensor, f"new header: tensor {tensor.name!r}")


def _encode(fields: Mapping[str, Any]) -> bytes:
    # Compact and with raw UTF-8, as serde_json writes it.
    try:
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"new header: a name is not text: {error}") from error

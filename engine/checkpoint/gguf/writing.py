"""The header of a GGUF file, version 3: settings, then the name, shape, type and place of each tensor.

All numbers are little-endian. Data begin at a multiple of 32 bytes, and so does each tensor.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGN_BYTES = 32
MAGIC, VERSION = b"GGUF", 3
F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # types of tensors
_U32, _I32, _FLOAT, _BOOL, _TEXT, _LIST = 4, 5, 6, 7, 8, 9  # types of settings
LONGEST_NAME = 63  # bytes of a tensor's name, which llama.cpp has room for

Value = bool | int | float | str | Sequence[str] | Sequence[float] | Sequence[int]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]  # from the slowest axis, as Hugging Face has it
    kind: int  # its type's number
    nbytes: int  # of its data, with what fills them up


def make_gguf_header(settings: Iterable[tuple[str, Value]], tensors: Sequence[GgufTensor]) -> bytes:
    """Return all of a file that goes before its data; the data lie in the order of `tensors`."""
    kept = list(settings)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kept))]
    parts += [_text(name) + _value(value) for name, value in kept]
    at = 0
    for tensor in tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_text(tensor.name), shape, struct.pack("<IQ", tensor.kind, at)]
        at += tensor.nbytes
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGN_BYTES)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool | int | float | str):
        kind = _kind_of(value)
        return struct.pack("<I", kind) + _item(value, kind)
    kind = _I32 if value and type(value[0]) is int else _kind_of(value[0]) if value else _TEXT
    return struct.pack("<IIQ", _LIST, kind, len(value)) + b"".join(_item(each, kind) for each in value)


def _kind_of(value: object) -> int:
    return (
        _BOOL
        if isinstance(value, bool)
        else _U32
        if isinstance(value, int)
        else _FLOAT
        if isinstance(value, float)
        else _TEXT
    )


def _item(value: object, kind: int) -> bytes:
    if kind == _TEXT:
        return _text(str(value))
    return struct.pack({_U32: "<I", _I32: "<i", _FLOAT: "<f", _BOOL: "<?"}[kind], value)

"""The safetensors header of a stored file, checked before any data is touched.

Format: https://huggingface.co/docs/safetensors#format. What safetensors 0.8.0 refuses is refused here.
Stricter than it, as the format's page asks: names given twice, a header that does not begin with ``{``, and
fields that the format does not know, since they could change what the bytes mean.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from mergemill.engine.checkpoint.layout import (
    DTYPE_BITS,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorInfo,
    check_size,
    count_bytes,
)
from mergemill.engine.errors import HeaderError
from mergemill.engine.storage.ranges import Pin, read_into
from mergemill.engine.storage.store import ENVIRONMENT, Storage

FIRST_BYTES = 64 << 10  # read at once, which is the whole header of most files
_FIELDS = ("dtype", "shape", "data_offsets")
_KNOWN = frozenset(_FIELDS)
_BY_PLACE = itemgetter(0, 1)
_INTEGER = {int}  # and not bool


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header."""

    tensors: tuple[TensorInfo, ...]  # in the order of their data
    offsets_bytes: tuple[int, ...]  # where the data of each tensor begins, from the start of the file
    metadata: Mapping[str, str]  # `__metadata__`; empty where there is none
    size_bytes: int  # of length, JSON and padding together: where the data begins


def read_header(pin: Pin, storage: Storage = ENVIRONMENT, *, where: str | None = None) -> Header:
    """Read and check the header of a stored file; `where` is what messages call it, else its path."""
    where = pin.url if where is None else where
    blob = _read(pin, 0, min(FIRST_BYTES, pin.size_bytes), storage)
    size_bytes = _measure(blob[:LENGTH_BYTES], pin.size_bytes, where)
    if size_bytes > len(blob):
        blob += _read(pin, len(blob), size_bytes, storage)
    return parse_header(blob, file_bytes=pin.size_bytes, where=where)


def parse_header(blob: bytes, *, file_bytes: int, where: str) -> Header:
    """Parse the header of a file of `file_bytes` that begins with `blob`; what follows it is not looked at.

    Raises `HeaderError`, whose message begins with `where`, for anything that breaks the format.
    """
    size_bytes = _measure(blob[:LENGTH_BYTES], file_bytes, where)
    fields = _parse_json(blob[LENGTH_BYTES:size_bytes], where)
    metadata = _parse_metadata(fields.pop("__metadata__", None), where)
    entries = [_parse_entry(name, entry, where) for name, entry in fields.items()]
    entries.sort(key=_BY_PLACE)
    _check_cover(entries, file_bytes - size_bytes, where)
    tensors = tuple(tensor for _, _, tensor in entries)
    return Header(tensors, tuple(size_bytes + begin for begin, _, _ in entries), metadata, size_bytes)


def _read(pin: Pin, start_bytes: int, stop_bytes: int, storage: Storage) -> bytes:
    buffer = bytearray(stop_bytes - start_bytes)
    read_into(pin, start_bytes, memoryview(buffer), storage)
    return bytes(buffer)


def _measure(length: bytes, file_bytes: int, where: str) -> int:
    if file_bytes < LENGTH_BYTES:
        raise HeaderError(f"{where}: {file_bytes} bytes; a safetensors file has at least {LENGTH_BYTES}")
    count = int.from_bytes(length, "little")
    if count > MAX_HEADER_BYTES:
        raise HeaderError(f"{where}: header of {count} bytes; the format allows {MAX_HEADER_BYTES}")
    end = LENGTH_BYTES + count
    if end > file_bytes:
        raise HeaderError(f"{where}: cut short: the header ends at byte {end}, the file at byte {file_bytes}")
    return end


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise HeaderError(f"{where}: header begins with {text[:1]!r}, not '{{'; is it a safetensors file?")
    # A lone surrogate needs an escape, and -0 its two characters: most headers have neither, and Python is asked less.
    unique = _unique_text if b"\\u" in text else _unique
    parse_int = _parse_int if b"-0" in text else None
    try:
        fields: dict[str, Any] = json.loads(
            text.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant, parse_int=parse_int
        )
    except _Repeated as error:
        raise HeaderError(f"{where}: header has {error.args[0]!r} more than once") from error
    except UnicodeError as error:
        raise HeaderError(f"{where}: header is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: header is not JSON: {error}") from error
    return fields


class _Repeated(Exception):
    """A JSON object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Repeated(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return fields


def _unique_text(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A lone surrogate (backslash-u d800) is no text, and could never be written again.
    fields = _unique(pairs)
    "".join([*fields, *(value for value in fields.values() if isinstance(value, str))]).encode()
    return fields


def _parse_int(text: str) -> int | float:
    # To safetensors -0 is a float; to Python it would be the integer 0.
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON value")


def _parse_metadata(found: object, where: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise HeaderError(f"{where}: __metadata__ is {_kind(found)}, not a map of strings to strings")
    for key, value in found.items():
        if not isinstance(value, str):
            raise HeaderError(f"{where}: __metadata__ has {_kind(value)} under {key!r}, not a string")
    return found


def _parse_entry(name: str, entry: object, where: str) -> tuple[int, int, TensorInfo]:
    """Return where a tensor's data begin and end, and the tensor; what is wrong is put into words only then."""
    if isinstance(entry, dict) and entry.keys() == _KNOWN:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = isinstance(dtype, str) and dtype in DTYPE_BITS and isinstance(shape, list) and isinstance(offsets, list)
        if known and len(offsets) == 2 and _are_counts([*offsets, *shape]):
            tensor = TensorInfo(name, dtype, tuple(shape))
            if 0 <= offsets[1] - offsets[0] == count_bytes(tensor):
                return offsets[0], offsets[1], tensor
    raise _explain(name, entry, where)


def _are_counts(found: Sequence[Any]) -> bool:
    return {*map(type, found)} == _INTEGER and min(found) >= 0 and max(found) < 2**64


def _explain(name: str, entry: object, where: str) -> HeaderError:
    """Return the error that says what is wrong with an entry."""
    where = f"{where}: tensor {name!r}"
    try:
        found = _parse_fields(entry, where)
        dtype = found["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise HeaderError(f"{where} has the unknown dtype {dtype!r}; known are {' '.join(DTYPE_BITS)}")
        tensor = TensorInfo(name, dtype, _parse_counts(found["shape"], f"{where} has shape"))
        offsets = _parse_counts(found["data_offsets"], f"{where} has data_offsets")
        if len(offsets) != 2:
            raise HeaderError(f"{where} has data_offsets {list(offsets)}, not [begin, end]")
        _check_offsets(tensor, *offsets, where)
    except HeaderError as error:
        return error
    raise AssertionError(where)


def _parse_fields(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise HeaderError(f"{where} is {_kind(entry)}, not an object with {', '.join(_FIELDS)}")
    if entry.keys() == _KNOWN:
        return entry
    if missing := [field for field in _FIELDS if field not in entry]:
        raise HeaderError(f"{where} has no {missing[0]}")
    extra = next(field for field in entry if field not in _FIELDS)
    raise HeaderError(f"{where} has a field {extra!r} that the format does not know")


def _parse_counts(found: object, where: str) -> tuple[int, ...]:
    if not isinstance(found, list):
        raise HeaderError(f"{where} {found!r}, not a list")
    for count in found:
        if type(count) is not int:  # isinstance would let True pass
            raise HeaderError(f"{where} {found}: {count!r} is not an integer")
        if count < 0:
            raise HeaderError(f"{where} {found}: {count} is negative")
        if count >= 2**64:
            raise HeaderError(f"{where} {found}: {count} is not below 2^64")
    return tuple(found)


def _check_offsets(tensor: TensorInfo, begin: int, end: int, where: str) -> None:
    if begin > end:
        raise HeaderError(f"{where} begins at byte {begin} of the data, after its end at byte {end}")
    check_size(tensor, where)
    if end - begin != tensor.nbytes:
        raise HeaderError(
            f"{where} is {tensor.dtype} {list(tensor.shape)}, {tensor.nbytes} bytes, "
            f"but its data_offsets [{begin}, {end}] hold {end - begin}"
        )


def _check_cover(entries: Sequence[tuple[int, int, TensorInfo]], data_bytes: int, where: str) -> None:
    at = 0
    for i, (begin, end, tensor) in enumerate(entries):
        if begin != at:
            before = f"tensor {entries[i - 1][2].name!r}" if i else "the header"
            if begin > at:
                raise HeaderError(f"{where}: hole of {begin - at} bytes from {before} to tensor {tensor.name!r}")
            raise HeaderError(f"{where}: {before} and tensor {tensor.name!r} overlap by {at - begin} bytes")
        at = end
    if at > data_bytes:
        raise HeaderError(f"{where}: cut short: {at} bytes of data in the header, {data_bytes} in the file")
    if at < data_bytes:
        raise HeaderError(f"{where}: {data_bytes - at} bytes after the last tensor belong to none")


def _kind(value: object) -> str:
    """Name a JSON value in a message.

    >>> _kind([1]), _kind(None), _kind(2)
    ('a list', 'null', 'a number')
    """
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")

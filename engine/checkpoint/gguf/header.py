"""Reading the header of a GGUF file: settings and the places of tensors, within bounds, before any data is touched.

A file may be anybody's. Nothing is taken for granted: counts are compared with the bytes that are left, lists but those
of tokens are passed over, what is kept of texts is short, and every tensor must lie in the file, apart from the others.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergemill.engine.checkpoint.gguf.writing import ALIGN_BYTES, MAGIC
from mergemill.engine.errors import HeaderError

MAX_HEADER_BYTES = 100_000_000  # as safetensors has it; that of a vocabulary of 256,000 tokens takes some 12 MB
MOST_TENSORS, MOST_SETTINGS = 1 << 18, 1 << 14
MOST_TEXTS = 1 << 22  # in all lists; a vocabulary of 256,000 tokens and its merges are a fifth of that
MOST_AXES = 4
LONGEST_TEXT = 1 << 16  # bytes of a setting that is kept; longer ones are passed over
KEPT = tuple(f"tokenizer.ggml.{each}" for each in ("tokens", "merges", "token_type", "scores"))
_FETCHED = 1 << 20  # bytes that are read at a time
_VERSIONS = (2, 3)
_TEXT, _LIST = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class GgufList(NamedTuple):
    """A list among the settings."""

    size: int
    values: tuple[Any, ...] = ()  # of those that say the tokens; of others they are not kept


class GgufKind(NamedTuple):
    """A type of tensors: so many elements take so many bytes."""

    name: str
    block: int
    block_bytes: int
    dtype: str = ""  # of safetensors, where it is a plain one


KINDS: Mapping[int, GgufKind] = {
    0: GgufKind("F32", 1, 4, "F32"),
    1: GgufKind("F16", 1, 2, "F16"),
    24: GgufKind("I8", 1, 1, "I8"),
    25: GgufKind("I16", 1, 2, "I16"),
    26: GgufKind("I32", 1, 4, "I32"),
    27: GgufKind("I64", 1, 8, "I64"),
    28: GgufKind("F64", 1, 8, "F64"),
    30: GgufKind("BF16", 1, 2, "BF16"),
    2: GgufKind("Q4_0", 32, 18),
    3: GgufKind("Q4_1", 32, 20),
    6: GgufKind("Q5_0", 32, 22),
    7: GgufKind("Q5_1", 32, 24),
    8: GgufKind("Q8_0", 32, 34),
    10: GgufKind("Q2_K", 256, 84),
    11: GgufKind("Q3_K", 256, 110),
    12: GgufKind("Q4_K", 256, 144),
    13: GgufKind("Q5_K", 256, 176),
    14: GgufKind("Q6_K", 256, 210),
    16: GgufKind("IQ2_XXS", 256, 66),
    17: GgufKind("IQ2_XS", 256, 74),
    18: GgufKind("IQ3_XXS", 256, 98),
    19: GgufKind("IQ1_S", 256, 50),
    20: GgufKind("IQ4_NL", 32, 18),
    21: GgufKind("IQ3_S", 256, 110),
    22: GgufKind("IQ2_S", 256, 82),
    23: GgufKind("IQ4_XS", 256, 136),
    29: GgufKind("IQ1_M", 256, 56),
    34: GgufKind("TQ1_0", 256, 54),
    35: GgufKind("TQ2_0", 256, 66),
    39: GgufKind("MXFP4", 32, 17),
}
"""The types that the package `gguf` dequantises, by number."""


@dataclass(frozen=True, slots=True)
class GgufPlace:
    """One tensor of a file."""

    name: str
    kind: GgufKind
    shape: tuple[int, ...]  # from the slowest axis
    offset_bytes: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself."""

    settings: Mapping[str, Any]  # numbers, and texts that are not long; of a list, a `GgufList`
    tensors: tuple[GgufPlace, ...]  # in the file's order


ReadSome = Callable[[int, int], bytes]  # given where in the file and how many bytes, which are there


def parse_gguf(read: ReadSome, file_bytes: int, *, where: str) -> GgufHeader:
    """Return the header of a file of `file_bytes`; `HeaderError` says what is wrong with it."""
    bytes_ = _Bytes(read, file_bytes, where)
    if bytes_.take(4) != MAGIC:
        raise HeaderError(f"{where}: does not begin with {MAGIC!r}; is it a GGUF file?")
    version, tensors, settings = bytes_.unpack("<I"), bytes_.unpack("<Q"), bytes_.unpack("<Q")
    if version not in _VERSIONS:
        raise HeaderError(f"{where}: is of version {version} of GGUF (or big-endian); versions 2 and 3 are read")
    if tensors > MOST_TENSORS or settings > MOST_SETTINGS:
        raise HeaderError(f"{where}: counts {tensors} tensors and {settings} settings, more than any model has")
    found = dict(_read_setting(bytes_) for _ in range(settings))
    if len(found) < settings:
        raise HeaderError(f"{where}: has a setting twice")
    infos = [_read_info(bytes_) for _ in range(tensors)]
    align = found.get("general.alignment", ALIGN_BYTES)
    if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
        raise HeaderError(f"{where}: general.alignment is {align!r}, no power of 2")
    first = -(-bytes_.at // align) * align
    places = tuple(GgufPlace(name, kind, shape, first + at, nbytes) for name, kind, shape, at, nbytes in infos)
    _check_places(places, align, file_bytes, where)
    return GgufHeader(found, places)


class _Bytes:
    """The beginning of a file, fetched as it is asked for."""

    def __init__(self, read: ReadSome, file_bytes: int, where: str) -> None:
        self._read = read
        self._file_bytes = min(file_bytes, MAX_HEADER_BYTES)
        self._where = where
        self._data = b""
        self._first = 0  # where in the file `_data` begins
        self.at = 0
        self.texts = 0  # in lists, which take a moment each to pass over

    def left(self) -> int:
        """Return how many bytes a header can still have."""
        return self._file_bytes - self.at

    def skip(self, size: int) -> None:
        """Pass over bytes."""
        if size > self.left():
            raise HeaderError(f"{self._where}: cut short: its header goes on at byte {self._file_bytes}")
        self.at += size

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        start = self.at
        self.skip(size)
        if start < self._first or self.at > self._first + len(self._data):
            count = min(max(size, _FETCHED), self._file_bytes - start)
            self._data, self._first = self._read(start, count), start
        return self._data[start - self._first : self.at - self._first]

    def unpack(self, form: str) -> Any:
        """Return the next number."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def text(self, longest: int) -> str | None:
        """Return the next text; None for one that is longer, which is passed over."""
        size = self.unpack("<Q")
        if size > longest:
            self.skip(size)
            return None
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise HeaderError(f"{self._where}: a text in its header is not UTF-8: {error}") from error

    def name(self, what: str) -> str:
        """Return the next text, which is the name of something."""
        found = self.text(LONGEST_TEXT)
        if not found:
            raise HeaderError(f"{self._where}: the name of a {what} is {'empty' if found == '' else 'too long'}")
        return found

    def fail(self, words: str) -> HeaderError:
        """Return the error that says what is wrong."""
        return HeaderError(f"{self._where}: {words}")


def _read_setting(bytes_: _Bytes) -> tuple[str, Any]:
    name = bytes_.name("setting")
    kind = bytes_.unpack("<I")
    if kind == _TEXT:
        return name, bytes_.text(LONGEST_TEXT)
    if kind == _LIST:
        return name, _pass_list(bytes_, name)
    if kind not in _NUMBERS:
        raise bytes_.fail(f"the setting {name!r} is of the unknown type {kind}")
    return name, bytes_.unpack(_NUMBERS[kind])


def _pass_list(bytes_: _Bytes, name: str) -> GgufList:
    """Pass over a list, unless it is one that is kept."""
    kind, count = bytes_.unpack("<I"), bytes_.unpack("<Q")
    if kind in _NUMBERS:
        start, size = bytes_.at, count * struct.calcsize(_NUMBERS[kind])
        bytes_.skip(size)
        if name in KEPT:
            bytes_.at = start
            return GgufList(count, struct.unpack(f"<{count}{_NUMBERS[kind][1]}", bytes_.take(size)))
    elif kind == _TEXT:
        bytes_.texts += count
        if count > bytes_.left() // 8 or bytes_.texts > MOST_TEXTS:  # the length of each takes 8 bytes
            raise bytes_.fail(f"the setting {name!r} lists {count} texts, more than a header has room for")
        if name in KEPT:
            return GgufList(count, _take_texts(bytes_, count))
        for _ in range(count):
            bytes_.skip(bytes_.unpack("<Q"))
    else:
        raise bytes_.fail(f"the setting {name!r} is a list of the type {kind}, which no model needs")
    return GgufList(count)


def _take_texts(bytes_: _Bytes, count: int) -> tuple[str, ...]:
    """Return the texts of a list; none where one is not UTF-8."""
    found = [bytes_.take(bytes_.unpack("<Q")) for _ in range(count)]
    try:
        return tuple(each.decode() for each in found)
    except UnicodeDecodeError:
        return ()


def _read_info(bytes_: _Bytes) -> tuple[str, GgufKind, tuple[int, ...], int, int]:
    name = bytes_.name("tensor")
    axes = bytes_.unpack("<I")
    if axes > MOST_AXES:
        raise bytes_.fail(f"tensor {name!r} has {axes} axes; GGUF has at most {MOST_AXES}")
    shape = tuple(reversed([bytes_.unpack("<Q") for _ in range(axes)]))
    number, at = bytes_.unpack("<I"), bytes_.unpack("<Q")
    kind = KINDS.get(number)
    if kind is None:
        raise bytes_.fail(f"tensor {name!r} is of the type {number}, which is not read")
    if math.prod(shape) >= 1 << 63 or any(size >= 1 << 63 for size in shape):
        raise bytes_.fail(f"tensor {name!r} has shape {list(shape)}, more than 2^63 elements")
    if (shape[-1] if shape else 1) % kind.block:
        raise bytes_.fail(f"tensor {name!r} has rows of {shape[-1] if shape else 1}; {kind.name} needs {kind.block}")
    return name, kind, shape, at, math.prod(shape) // kind.block * kind.block_bytes


def _check_places(places: tuple[GgufPlace, ...], align: int, file_bytes: int, where: str) -> None:
    if len({place.name for place in places}) < len(places):
        raise HeaderError(f"{where}: has two tensors of one name")
    stop, before = 0, "the header"
    for place in sorted(places, key=lambda place: (place.offset_bytes, place.nbytes)):
        if place.offset_bytes % align:
            at = f"byte {place.offset_bytes}, no multiple of {align}"
            raise HeaderError(f"{where}: tensor {place.name!r} begins at {at}")
        if place.offset_bytes < stop:
            raise HeaderError(f"{where}: {before} and tensor {place.name!r} overlap")
        stop, before = place.offset_bytes + place.nbytes, f"tensor {place.name!r}"
    if stop > file_bytes:
        raise HeaderError(f"{where}: cut short: {before} ends at byte {stop}, the file at byte {file_bytes}")

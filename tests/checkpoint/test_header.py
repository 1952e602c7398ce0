"""Attacks on the header: each has its own message, and nothing that safetensors refuses passes."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from mergemill.engine.checkpoint import DTYPE_BITS, TensorInfo, parse_header, read_header
from mergemill.engine.errors import HeaderError
from mergemill.engine.storage.ranges import pin_file


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 1, *, dtype: object = "U8", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(blob: bytes):
    return parse_header(blob, file_bytes=len(blob), where="m.safetensors")


def safetensors_accepts(blob: bytes) -> bool:
    try:
        deserialize(blob)
    except SafetensorError:
        return False
    return True


ONE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
SHAPE = b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}'
KNOWN = " ".join(DTYPE_BITS)

# What safetensors refuses: (file, message after the file's name)
REFUSED = {
    "empty file": (b"", "0 bytes; a safetensors file has at least 8"),
    "seven bytes": (b"1234567", "7 bytes; a safetensors file has at least 8"),
    "length too large": (
        struct.pack("<Q", 100_000_001) + ONE,
        "header of 100000001 bytes; the format allows 100000000",
    ),
    "length of all bits": (b"\xff" * 8, "header of 18446744073709551615 bytes; the format allows 100000000"),
    "length beyond file": (
        struct.pack("<Q", 99) + b"{}",
        "cut short: the header ends at byte 107, the file at byte 10",
    ),
    "no header": (pack(b""), "header begins with b'', not '{'; is it a safetensors file?"),
    "a list": (pack(b"[]"), "header begins with b'[', not '{'; is it a safetensors file?"),
    "pickle": (pack(b"\x80\x02"), "header begins with b'\\x80', not '{'; is it a safetensors file?"),
    "not utf-8": (
        pack(b'{"\xff":1}'),
        "header is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte",
    ),
    "not json": (
        pack(b'{"a":}'),
        "header is not JSON: Expecting value: line 1 column 6 (char 5)",
    ),
    "text after json": (
        pack(ONE + b"\0", b"x"),
        "header is not JSON: Extra data: line 1 column 54 (char 53)",
    ),
    "nan": (pack(b'{"__metadata__":{"a":NaN}}'), "header is not JSON: NaN is not a JSON value"),
    "lone surrogate in a name": (
        pack(ONE.replace(b'"a"', b'"\\ud800"'), b"x"),
        "header is not UTF-8: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
    ),
    "metadata twice": (
        pack(b'{"__metadata__":{},"__metadata__":{}}'),
        "header has '__metadata__' more than once",
    ),
    "field twice": (
        pack(ONE.replace(b'"shape":[1]', b'"shape":[1],"shape":[1]'), b"x"),
        "header has 'shape' more than once",
    ),
    "metadata is a list": (
        pack({"__metadata__": []}),
        "__metadata__ is a list, not a map of strings to strings",
    ),
    "metadata holds a number": (
        pack({"__metadata__": {"n": 1}}),
        "__metadata__ has a number under 'n', not a string",
    ),
    "metadata holds null": (
        pack({"__metadata__": {"n": None}}),
        "__metadata__ has null under 'n', not a string",
    ),
    "tensor is a number": (
        pack({"a": 1}),
        "tensor 'a' is a number, not an object with dtype, shape, data_offsets",
    ),
    "no offsets": (pack({"a": {"dtype": "U8", "shape": []}}), "tensor 'a' has no data_offsets"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), "tensor 'a' has no dtype"),
    "unknown dtype": (
        pack({"a": entry(dtype="F128")}, b"x"),
        f"tensor 'a' has the unknown dtype 'F128'; known are {KNOWN}",
    ),
    "dtype is a number": (
        pack({"a": entry(dtype=8)}, b"x"),
        f"tensor 'a' has the unknown dtype 8; known are {KNOWN}",
    ),
    "shape is null": (pack({"a": entry(shape=None)}, b"x"), "tensor 'a' has shape None, not a list"),
    "negative shape": (pack({"a": entry(shape=[-1])}, b"x"), "tensor 'a' has shape [-1]: -1 is negative"),
    "minus zero": (pack(SHAPE % b"-0", b"x"), "tensor 'a' has shape [-0.0]: -0.0 is not an integer"),
    "float shape": (pack(SHAPE % b"1.0", b"x"), "tensor 'a' has shape [1.0]: 1.0 is not an integer"),
    "boolean shape": (pack(SHAPE % b"true", b"x"), "tensor 'a' has shape [True]: True is not an integer"),
    "shape beyond 64 bits": (
        pack({"a": entry(shape=[2**64])}, b"x"),
        "tensor 'a' has shape [18446744073709551616]: 18446744073709551616 is not below 2^64",
    ),
    "negative offset": (
        pack({"a": entry(-1, 0)}, b"x"),
        "tensor 'a' has data_offsets [-1, 0]: -1 is negative",
    ),
    "three offsets": (
        pack({"a": entry() | {"data_offsets": [0, 1, 1]}}, b"x"),
        "tensor 'a' has data_offsets [0, 1, 1], not [begin, end]",
    ),
    "one offset": (
        pack({"a": entry() | {"data_offsets": [0]}}, b"x"),
        "tensor 'a' has data_offsets [0], not [begin, end]",
    ),
    "begin after end": (
        pack({"a": entry(1, 0)}, b"x"),
        "tensor 'a' begins at byte 1 of the data, after its end at byte 0",
    ),
    "product overflows": (
        pack({"a": entry(shape=[2**32, 2**32])}, b"x"),
        "tensor 'a' overflows: U8 [4294967296, 4294967296] counts 2^64 or more",
    ),
    "product overflows before a zero": (
        pack({"a": entry(0, 0, shape=[2**63, 2, 0])}),
        "tensor 'a' overflows: U8 [9223372036854775808, 2, 0] counts 2^64 or more",
    ),
    "bits overflow": (
        pack({"a": entry(0, 2**63, dtype="F64", shape=[2**60])}),
        "tensor 'a' overflows: F64 [1152921504606846976] counts 2^64 or more",
    ),
    "half a byte": (
        pack({"a": entry(0, 2, dtype="F4", shape=[3])}, b"xx"),
        "tensor 'a' is F4 [3]: 12 bits, not a whole number of bytes",
    ),
    "too few bytes for the shape": (
        pack({"a": entry(0, 4, dtype="F32", shape=[2])}, b"xxxx"),
        "tensor 'a' is F32 [2], 8 bytes, but its data_offsets [0, 4] hold 4",
    ),
    "hole at the start": (
        pack({"a": entry(1, 2)}, b"xx"),
        "hole of 1 bytes from the header to tensor 'a'",
    ),
    "hole between": (
        pack({"a": entry(), "b": entry(3, 4)}, b"xxxx"),
        "hole of 2 bytes from tensor 'a' to tensor 'b'",
    ),
    "overlap": (
        pack({"a": entry(0, 4, shape=[4]), "b": entry(2, 6, shape=[4])}, b"xxxxxx"),
        "tensor 'a' and tensor 'b' overlap by 2 bytes",
    ),
    "the same bytes twice": (
        pack({"a": entry(), "b": entry()}, b"x"),
        "tensor 'a' and tensor 'b' overlap by 1 bytes",
    ),
    "empty tensor inside another": (
        pack({"a": entry(1, 1, shape=[0]), "b": entry(0, 2, shape=[2])}, b"xx"),
        "tensor 'b' and tensor 'a' overlap by 1 bytes",
    ),
    "truncated data": (
        pack({"a": entry(0, 4, shape=[4])}, b"xx"),
        "cut short: 4 bytes of data in the header, 2 in the file",
    ),
    "trailing bytes": (pack(ONE, b"xyz"), "2 bytes after the last tensor belong to none"),
}

# What safetensors 0.8.0 lets pass, against the letter of the format
STRICTER = {
    "name twice": (pack(b"{%s,%s}" % (ONE[1:-1], ONE[1:-1]), b"x"), "header has 'a' more than once"),
    "metadata key twice": (
        pack(b'{"__metadata__":{"k":"1","k":"2"}}'),
        "header has 'k' more than once",
    ),
    "space first": (
        pack(b" " + ONE, b"x"),
        "header begins with b' ', not '{'; is it a safetensors file?",
    ),
    "unknown field": (
        pack({"a": entry() | {"scale": "s"}}, b"x"),
        "tensor 'a' has a field 'scale' that the format does not know",
    ),
    "tensor as a list": (
        pack({"a": ["U8", [1], [0, 1]]}, b"x"),
        "tensor 'a' is a list, not an object with dtype, shape, data_offsets",
    ),
}

SOUND = {
    "nothing": pack({}),
    "scalar": pack({"a": entry(0, 4, dtype="F32", shape=[])}, b"xxxx"),
    "empty tensors at both ends": pack(
        {"a": entry(0, 0, shape=[0]), "b": entry(), "c": entry(1, 1, shape=[3, 0])}, b"x"
    ),
    "zero first, so no overflow": pack({"a": entry(0, 0, shape=[0, 2**63, 4])}),
    "padded": pack(ONE + b" " * 100 + b"\n", b"x"),
    "misaligned": pack({"a": entry(), "b": entry(1, 5, dtype="F32")}, b"xxxxx"),
    "metadata null": pack({"__metadata__": None, "a": entry()}, b"x"),
    "below a byte": pack({"a": entry(0, 3, dtype="F6_E2M3", shape=[4])}, b"xxx"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_attack_is_refused_with_its_message(attack):
    blob, message = REFUSED[attack]
    assert not safetensors_accepts(blob)
    with pytest.raises(HeaderError) as refusal:
        parse(blob)
    assert str(refusal.value) == f"m.safetensors: {message}"


@pytest.mark.parametrize("attack", STRICTER)
def test_what_only_the_specification_forbids_is_refused_too(attack):
    blob, message = STRICTER[attack]
    assert safetensors_accepts(blob)
    with pytest.raises(HeaderError) as refusal:
        parse(blob)
    assert str(refusal.value) == f"m.safetensors: {message}"


@pytest.mark.parametrize("kind", SOUND)
def test_sound_header_is_accepted(kind):
    assert safetensors_accepts(SOUND[kind])
    parse(SOUND[kind])


def test_deeply_nested_json_is_an_error_and_no_crash():
    with pytest.raises(HeaderError, match=r"^m\.safetensors: header is not JSON"):
        parse(pack(b'{"a":' + b"[" * 100_000))


def test_product_of_many_axes_is_cut_off_early():
    with pytest.raises(HeaderError, match="counts 2\\^64 or more"):
        parse(pack({"a": entry(shape=[2] * 500_000)}, b"x"))


counts = st.integers(-1, 6)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F4", "X"]),
        "shape": st.lists(counts, max_size=2),
        "data_offsets": st.lists(counts, min_size=2, max_size=2),
    }
)


@given(fields=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), size=st.integers(0, 8))
def test_arithmetic_of_offsets_agrees_with_safetensors(fields, size):
    blob = pack(fields, b"\0" * size)
    if safetensors_accepts(blob):
        assert {info.name for info in parse(blob).tensors} == set(fields)
    else:
        with pytest.raises(HeaderError):
            parse(blob)


@given(at=st.integers(0, 120), byte=st.integers(0, 255))
def test_no_changed_byte_passes_here_that_safetensors_refuses(at, byte):
    blob = bytearray(save({"a": torch.zeros(3), "é": torch.zeros(2, dtype=torch.bool)}, {"k": "v"}))
    blob[at] = byte
    if not safetensors_accepts(bytes(blob)):
        with pytest.raises(HeaderError):
            parse(bytes(blob))


@pytest.mark.parametrize("cut", [0, 4, 8, 30, -1])
def test_truncated_file_is_refused(cut, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(HeaderError, match=r"m\.safetensors: "):
        read_header(pin_file(path))


def test_file_is_read_up_to_its_data(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.bfloat16)}, path, {"format": "pt"})
    header = read_header(pin_file(path))
    assert header.tensors == (TensorInfo("b", "F32", (2, 3)), TensorInfo("a", "BF16", (5,)))
    assert header.offsets_bytes == (header.size_bytes, header.size_bytes + 24)
    assert header.metadata == {"format": "pt"}
    assert path.stat().st_size == header.size_bytes + 34


def test_caller_may_name_the_file(tmp_path: Path):
    path = tmp_path / "blob"
    path.write_bytes(b"")
    with pytest.raises(HeaderError, match=r"^shard 3: 0 bytes"):
        read_header(pin_file(path), where="shard 3")

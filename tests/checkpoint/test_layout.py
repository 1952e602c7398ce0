"""Headers that we write are those that safetensors writes, byte for byte."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from mergemill.engine.checkpoint import (
    DTYPE_BITS,
    TensorInfo,
    file_order,
    make_header,
    make_offsets,
    parse_header,
)
from mergemill.engine.errors import HeaderError

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tables = st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH)), shapes), max_size=8)


def make_infos(table: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[TensorInfo, ...]:
    return file_order(TensorInfo(name, dtype, shape) for name, (dtype, shape) in table.items())


@given(table=tables, metadata=st.dictionaries(texts, texts, min_size=1, max_size=1) | st.none())
def test_header_is_what_save_file_writes(table, metadata):
    tensors = {name: torch.empty(shape, dtype=TORCH[dtype]) for name, (dtype, shape) in table.items()}
    blob = save(tensors, metadata)
    header = make_header(make_infos(table), metadata or {})
    assert header == blob[: len(header)]
    assert len(blob) - len(header) == sum(tensor.nbytes for tensor in tensors.values())


@given(table=tables, metadata=st.dictionaries(texts, texts, max_size=3), align=st.sampled_from([1, 8, 4096]))
def test_header_parses_to_what_it_was_made_from(table, metadata, align):
    infos = make_infos(table)
    blob = make_header(infos, metadata, align_bytes=align)
    file_bytes = len(blob) + sum(info.nbytes for info in infos)
    header = parse_header(blob, file_bytes=file_bytes, where="x")
    # Empty tensors share an offset with their neighbour, and keep its place in no defined order.
    assert sorted(zip(header.tensors, header.offsets_bytes, strict=True), key=str) == sorted(
        zip(infos, make_offsets(infos, len(blob)), strict=True), key=str
    )
    assert header.metadata == metadata
    assert header.size_bytes == len(blob)
    assert header.size_bytes % align == 0


@pytest.mark.parametrize(
    "name",
    [
        'quote"',
        "back\\slash",
        "\x08\x0c\n\r\t\x00\x1f\x7f",
        "é",
        "\u2028",
        "😀",
        "</script>",
        "",
        "a/b",
        "\ufeff",
    ],
)
def test_odd_name_is_escaped_as_serde_does(name, tmp_path: Path):
    save_file({name: torch.zeros(3)}, tmp_path / "m.safetensors", metadata={name: name})
    header = make_header([TensorInfo(name, "F32", (3,))], {name: name})
    assert (tmp_path / "m.safetensors").read_bytes() == header + b"\0" * 12


def test_every_known_dtype_is_known_to_safetensors_in_the_same_order():
    infos = file_order(TensorInfo(dtype, dtype, (8,)) for dtype in DTYPE_BITS)
    blob = make_header(infos, {}) + b"\0" * sum(info.nbytes for info in infos)
    assert {name for name, _ in deserialize(blob)} == set(DTYPE_BITS)
    with pytest.raises(SafetensorError, match="expected one of") as refusal:
        deserialize(make_header([TensorInfo("a", "U8", (1,))], {}).replace(b'"U8"', b'"U9"') + b"\0")
    known = str(refusal.value).split("expected one of ")[1].split(" at line")[0]
    assert known.replace("`", "").split(", ") == list(DTYPE_BITS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorInfo("a", "U8", ()), TensorInfo("a", "U8", ())], "new header: tensor name 'a' is taken"),
        ([TensorInfo("__metadata__", "U8", ())], "new header: tensor name '__metadata__' is taken"),
        (
            [TensorInfo("a", "F4", (3,))],
            "new header: tensor 'a' is F4 [3]: 12 bits, not a whole number of bytes",
        ),
        (
            [TensorInfo("a", "F64", (2**60,))],
            "new header: tensor 'a' overflows: F64 [1152921504606846976] counts 2^64 or more",
        ),
    ],
)
def test_header_that_could_not_be_read_back_is_refused(tensors, message):
    with pytest.raises(HeaderError) as refusal:
        make_header(tensors, {})
    assert str(refusal.value) == message


def test_lone_surrogate_is_refused():
    with pytest.raises(HeaderError, match="new header: a name is not text"):
        make_header([TensorInfo("\ud800", "U8", ())], {})


def test_order_of_metadata_does_not_matter():
    assert make_header([], {"b": "1", "a": "2"}) == make_header([], {"a": "2", "b": "1"})


def test_too_long_a_header_is_refused():
    with pytest.raises(HeaderError, match="the format allows 100000000; write more shards"):
        make_header([], {"a": "x" * 100_000_000})

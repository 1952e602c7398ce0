"""Attacks on the index: each has its own message, with names."""

import json

import pytest

from mergemill.engine.checkpoint import check_index, parse_index
from mergemill.engine.checkpoint.index import check_shards
from mergemill.engine.errors import IndexFileError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def dump(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


BROKEN = {
    "not json": (
        b"{",
        "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "not utf-8": (
        b"\xff{}",
        "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    "a list": (b"[]", "is not a JSON object"),
    "no map": (b"{}", "has no 'weight_map' from tensor names to file names"),
    "map is a list": (dump([]), "has no 'weight_map' from tensor names to file names"),
    "empty map": (dump({}), "has no 'weight_map' from tensor names to file names"),
    "tensor twice": (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "has 'a' more than once"),
    "number": (dump({"a": 1}), "tensor 'a' is mapped to 1, not to a file name"),
    "pickle": (dump({"a": "x.bin"}), "tensor 'a' is mapped to 'x.bin', which is not a safetensors file"),
    "up": (
        dump({"a": "../x.safetensors"}),
        "tensor 'a' is mapped to '../x.safetensors', which is outside the folder",
    ),
    "down and up": (
        dump({"a": "b/../../x.safetensors"}),
        "tensor 'a' is mapped to 'b/../../x.safetensors', which is outside the folder",
    ),
    "absolute": (
        dump({"a": "/x.safetensors"}),
        "tensor 'a' is mapped to '/x.safetensors', which is outside the folder",
    ),
    "backslash": (
        dump({"a": "..\\x.safetensors"}),
        "tensor 'a' is mapped to '..\\\\x.safetensors', which is outside the folder",
    ),
    "drive": (
        dump({"a": "C:x.safetensors"}),
        "tensor 'a' is mapped to 'C:x.safetensors', which is outside the folder",
    ),
    "url": (
        dump({"a": "s3://b/x.safetensors"}),
        "tensor 'a' is mapped to 's3://b/x.safetensors', which is outside the folder",
    ),
    "null byte": (
        dump({"a": "x\0.safetensors"}),
        "tensor 'a' is mapped to 'x\\x00.safetensors', which is outside the folder",
    ),
}


@pytest.mark.parametrize("attack", BROKEN)
def test_broken_index_is_refused_with_its_message(attack):
    text, message = BROKEN[attack]
    with pytest.raises(IndexFileError) as refusal:
        parse_index(text, where="index")
    assert str(refusal.value) == f"index: {message}"


def test_index_maps_tensors_to_shards_in_its_order():
    assert list(parse_index(dump({"b": B, "a": f"sub/{A}"}), where="").items()) == [
        ("b", B),
        ("a", f"sub/{A}"),
    ]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({A: {"a"}, B: set()}, f"index: {B} does not hold tensor 'b' and 1 more named for it"),
        ({A: {"a", "x"}, B: {"b", "c"}}, f"index: does not name tensor 'x', which {A} holds"),
        ({A: {"a", "b"}, B: {"b", "c"}}, f"index: tensor 'b' is in two shards, {B} and {A}"),
        ({A: {"a", "b"}, B: {"c"}}, f"index: tensor 'b' is in {A}, not in {B} as the index says"),
    ],
)
def test_shards_that_differ_from_the_index_are_named(shards, message):
    with pytest.raises(IndexFileError) as refusal:
        check_index({"a": A, "b": B, "c": B}, shards, where="index")
    assert str(refusal.value) == message


def test_shards_as_the_index_says_pass():
    check_index({"a": A, "b": B}, {A: {"a"}, B: {"b"}}, where="index")


def test_missing_shards_are_named_and_counted():
    weight_map = {"a": A, "b": B, "c": "third.safetensors"}
    with pytest.raises(IndexFileError) as refusal:
        check_shards(weight_map, {A}, where="index")
    assert str(refusal.value) == f"index: shard '{B}' and 1 more of 3 not there; is the download complete?"
    assert check_shards({"b": B, "a": A}, {A, B}, where="index") == (A, B)

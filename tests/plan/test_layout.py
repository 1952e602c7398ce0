"""Where every byte of the output lies: shards, headers, parts."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan.sketches import config, count_bytes, llama, parse_header, plan_of, write_sketch

from mergemill.engine.errors import InputError
from mergemill.engine.plan.layout import (
    LEAST_PART_BYTES,
    PART_BYTES,
    choose_part_bytes,
    make_layout,
    natural_order,
)
from mergemill.engine.plan.values import OutputTensor, Part, Shard
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.slabs import BLOCK

DTYPES = ["BF16", "F16", "F32", "F64", "I64", "U8", "BOOL"]
SHAPES = st.one_of(
    st.lists(st.integers(0, 40), max_size=3),
    st.tuples(st.integers(1, 900), st.integers(1, 50_000)).map(list),  # up to 45 million elements
)
TENSORS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=8)


def make_tensors(sketches: list[tuple[str, list[int]]]) -> list[OutputTensor]:
    """Return output tensors with those dtypes and shapes."""
    pin = Pin("/nowhere", 0, "")
    return [
        OutputTensor(f"layers.{i}.w", dtype, Stored(pin, 0, dtype, tuple(shape)))
        for i, (dtype, shape) in enumerate(sketches)
    ]


def layout(sketches: list[tuple[str, list[int]]], size: str | int) -> tuple[tuple[Shard, ...], tuple[Part, ...]]:
    return make_layout(make_tensors(sketches), size)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.one_of(st.integers(1, 10**9), st.just("tensor")))
@example([("F32", [])], 1)
@example([("F32", [0]), ("BF16", [3, 0])], 10**9)
@example([("F64", [4096, 65_537]), ("U8", [1])], 10**12)
def test_parts_cover_the_data_of_every_shard_once_in_order(sketches: list[Any], size: str | int) -> None:
    shards, parts = layout(sketches, size)
    assert [part.number for part in parts] == list(range(len(parts)))
    for i, shard in enumerate(shards):
        at = len(shard.header)
        for part in (part for part in parts if part.shard == i):
            assert part.start_bytes == at
            for piece in part.pieces:
                assert piece.offset_bytes == at
                at += piece.span.size * item_bytes(piece.tensor.dtype)
            assert part.stop_bytes == at
            assert part.pieces
        assert at == shard.size_bytes
    assert [part.shard for part in parts] == sorted(part.shard for part in parts)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.one_of(st.integers(1, 10**9), st.just("tensor")))
def test_pieces_lie_where_the_header_says_and_are_cut_at_whole_blocks(sketches: list[Any], size: str | int) -> None:
    shards, parts = layout(sketches, size)
    covered: dict[str, int] = {}
    for part in parts:
        shard = shards[part.shard]
        entries = parse_header(shard.header)
        for piece in part.pieces:
            entry, item = entries[piece.tensor.name], item_bytes(piece.tensor.dtype)
            assert entry["dtype"] == piece.tensor.dtype
            assert tuple(entry["shape"]) == piece.tensor.expression.shape
            begin = len(shard.header) + entry["data_offsets"][0]
            assert piece.offset_bytes == begin + piece.span.start * item
            assert piece.span.start == covered.get(piece.tensor.name, 0)
            assert piece.span.start % BLOCK == 0
            assert piece.whole == (piece.span.size * item == count_bytes(entry))
            covered[piece.tensor.name] = piece.span.stop
    entries = {name: entry for shard in shards for name, entry in parse_header(shard.header).items()}
    sizes = {name: count_bytes(entry) // item_bytes(entry["dtype"]) for name, entry in entries.items()}
    assert covered == {name: size for name, size in sizes.items() if size}
    assert sorted(entries) == sorted(f"layers.{i}.w" for i in range(len(sketches)))


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.integers(1, 10**9))
def test_shards_hold_no_more_than_asked_unless_one_tensor_does(sketches: list[Any], size: int) -> None:
    shards, _ = layout(sketches, size)
    filled = [sum(count_bytes(entry) for entry in parse_header(shard.header).values()) for shard in shards]
    assert all(data <= size or len(shard.tensors) == 1 for data, shard in zip(filled, shards, strict=True))
    # As few as that order allows: what begins a shard would not have fitted into the one before.
    first = [min(shard.tensors, key=natural_order) for shard in shards[1:]]
    entries = {name: entry for shard in shards for name, entry in parse_header(shard.header).items()}
    assert all(data + count_bytes(entries[name]) > size for data, name in zip(filled, first, strict=False))


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.integers(1, 10**9))
def test_parts_are_no_larger_than_they_are_cut_to(sketches: list[Any], size: int) -> None:
    shards, parts = layout(sketches, size)
    most = choose_part_bytes(sum(shard.size_bytes for shard in shards))
    assert all(part.size_bytes < most + LEAST_PART_BYTES for part in parts), "or a smaller one was filled up"
    assert all(part.size_bytes >= LEAST_PART_BYTES for part, after in pairwise(parts) if part.shard == after.shard)
    assert LEAST_PART_BYTES <= most <= PART_BYTES


def test_one_shard_a_tensor() -> None:
    sketches = [("F32", [3]), ("F32", [0]), ("BF16", []), ("I64", [2, 2])]
    shards, parts = layout(sketches, "tensor")
    assert [shard.tensors for shard in shards] == [(f"layers.{i}.w",) for i in range(4)]
    assert [(part.shard, part.size_bytes) for part in parts] == [(0, 12), (2, 2), (3, 32)]


def test_tensors_without_elements_and_scalars_are_in_the_header_and_cost_what_they_hold() -> None:
    (shard,), (part,) = layout([("F32", [0, 5]), ("F32", []), ("F32", [2])], "5GB")
    assert parse_header(shard.header)["layers.0.w"] == {
        "dtype": "F32",
        "shape": [0, 5],
        "data_offsets": [0, 0],
    }
    assert parse_header(shard.header)["layers.1.w"]["shape"] == []
    assert part.size_bytes == 4 + 8


def test_a_shard_without_a_byte_of_data_has_no_part() -> None:
    (shard,), parts = layout([("F32", [0])], "5GB")
    assert (shard.size_bytes, parts) == (len(shard.header), ())


def test_small_tensors_ride_with_their_neighbours() -> None:
    _, parts = layout([("BF16", [1000])] * 500, "5GB")
    assert [len(part.pieces) for part in parts] == [500]


def test_a_tensor_larger_than_a_part_is_cut_evenly() -> None:
    _, parts = layout([("BF16", [128_256, 8192])], "5GB")  # 2.1 GB: the embedding of a 70B
    sizes = [part.size_bytes for part in parts]
    assert len(sizes) == 65
    assert len(set(sizes[:-1])) == 1
    assert 0 < sizes[-1] <= sizes[0] <= 2 * 128_256 * 8192 // 64


def test_a_shard_is_filled_to_its_last_byte() -> None:
    shards, _ = layout([("U8", [4]), ("U8", [6]), ("U8", [10]), ("U8", [1])], 10)
    assert [len(shard.tensors) for shard in shards] == [2, 1, 1]


def test_shards_are_numbered_as_on_the_hub() -> None:
    shards, _ = layout([("U8", [10])] * 3, 10)
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize("size", ["0", "-1", "lots", "5 bananas"])
def test_a_shard_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(InputError, match=r"--shard-size: .* is not a size"):
        layout([("U8", [1])], size)


def test_tensors_follow_the_model_from_embedding_to_head_with_layers_in_natural_order(tmp_path: Path) -> None:
    write_sketch(tmp_path / "a", llama(layers=12), config=config(layers=12))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}
    names = [name for shard in plan_of(recipe, shard_size="tensor").shards for name in shard.tensors]
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == [i for i in range(12) for _ in range(9)]
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]


def test_experts_are_in_natural_order_too() -> None:
    names = ["e.10.w", "e.9.w", "e.w", "e.1.w2", "e.1.w10"]
    assert sorted(names, key=natural_order) == ["e.1.w2", "e.1.w10", "e.9.w", "e.10.w", "e.w"]


@pytest.mark.parametrize(("method", "pieces"), [("task_arithmetic", (5, 13)), ("ties", (1, 2))])
def test_what_must_be_known_whole_is_cut_above_64_mib_only(
    method: str, pieces: tuple[int, int], tmp_path: Path
) -> None:
    """Of a merge of 89 MiB: a tensor of 24 MiB and one of 65, whose pieces would be read again in every pass."""
    sketch = {"layers.0.w": ("BF16", (3 << 10, 4 << 10)), "layers.1.w": ("BF16", (65 << 5, 1 << 14))}
    folders = [str(write_sketch(tmp_path / name, sketch)) for name in ("base", "a")]
    recipe = {"merge_method": method, "base_model": folders[0], "models": [{"model": folders[1]}]}
    plan = plan_of(recipe | {"parameters": {"weight": 1, **({"density": 0.5} if method == "ties" else {})}})
    found = [piece.tensor.name for part in plan.parts for piece in part.pieces]
    assert (found.count("layers.0.w"), found.count("layers.1.w")) == pieces

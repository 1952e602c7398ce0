"""A workspace hands out its arena: aligned, apart from each other, within bounds, and kept where asked."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergemill.engine.storage.ranges import Pin, pin_file
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned


def make_arena(size_bytes: int) -> Arena:
    return np.full(size_bytes, 0xAB, np.uint8)


@pytest.fixture
def pin(tmp_path: Path) -> Pin:
    """A file of 1,000 bytes that count up."""
    path = tmp_path / "stored.bin"
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    return pin_file(path)


def counting(start: int, size: int) -> list[int]:
    return [i % 251 for i in range(start, start + size)]


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from(sorted(TORCH_DTYPES))), max_size=12))
def test_tensors_are_aligned_and_do_not_overlap(wanted: list[tuple[int, str]]) -> None:
    arena = make_arena(12 * aligned(50 * 8))
    work = Workspace(arena)
    taken = [work.take((size,), dtype) for size, dtype in wanted]
    ends = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in taken if len(x)]
    assert all((start - arena.ctypes.data) % 64 == 0 for start, _ in ends)
    assert all(arena.ctypes.data <= start <= stop <= arena.ctypes.data + len(arena) for start, stop in ends)
    assert all(left[1] <= right[0] for left, right in pairwise(ends))
    assert [x.dtype for x in taken] == [TORCH_DTYPES[dtype] for _, dtype in wanted]


def test_shapes_come_as_asked() -> None:
    work = Workspace(make_arena(1024))
    assert work.take((), "F32").shape == ()
    assert work.take((3, 4), "BF16").shape == (3, 4)
    assert work.take((0, 5), "F64").shape == (0, 5)


def test_the_next_slab_has_the_same_memory() -> None:
    work = Workspace(make_arena(256))
    first = work.take((64,), "F32")
    work.next_slab()
    assert work.take((64,), "F32").data_ptr() == first.data_ptr()


def test_taking_more_than_there_is_names_both_numbers() -> None:
    work = Workspace(make_arena(256))
    work.take((1,), "F32")
    with pytest.raises(MemoryError, match="a slab needs 320 bytes of a workspace of 256"):
        work.take((64,), "F32")


def test_reads_are_what_is_stored(pin: Pin) -> None:
    work = Workspace(make_arena(512))
    assert work.read(pin, 10, 100).tolist() == counting(10, 100)
    assert work.read(pin, 0, 0).tolist() == []
    assert work.read_bytes == 100


def test_reads_of_one_slab_do_not_overlap(pin: Pin) -> None:
    work = Workspace(make_arena(512))
    reads = [work.read(pin, start, 100) for start in (0, 7, 500)]
    assert [read.tolist() for read in reads] == [counting(start, 100) for start in (0, 7, 500)]


def test_without_keep_a_range_is_read_again(pin: Pin) -> None:
    work = Workspace(make_arena(512))
    for _ in range(3):
        work.next_slab()
        assert work.read(pin, 10, 100).tolist() == counting(10, 100)
    assert work.read_bytes == 300


def test_kept_reads_outlive_slabs_and_are_read_once(pin: Pin) -> None:
    work = Workspace(make_arena(1024), keep=True)
    for _ in range(3):
        for start in (0, 100, 200):
            work.next_slab()
            assert work.read(pin, start, 100).tolist() == counting(start, 100)
            work.take((128,), "F32").fill_(-1.0)
    assert work.read_bytes == 300


def test_a_kept_range_of_another_size_is_read_anew(pin: Pin) -> None:
    work = Workspace(make_arena(1024), keep=True)
    assert work.read(pin, 0, 100).tolist() == counting(0, 100)
    assert work.read(pin, 0, 40).tolist() == counting(0, 40)


def test_kept_reads_of_two_files_are_told_apart(pin: Pin, tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(b"\x01" * 1000)
    other, work = pin_file(tmp_path / "other.bin"), Workspace(make_arena(1024), keep=True)
    assert work.read(pin, 0, 50).tolist() == counting(0, 50)
    assert work.read(other, 0, 50).tolist() == [1] * 50


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [500, 1000])
def test_reading_more_than_there_is_is_a_memory_error(pin: Pin, keep: bool, size: int) -> None:
    arena = make_arena(700)
    work = Workspace(arena[:448], keep=keep)
    work.take((16,), "F32")
    with pytest.raises(MemoryError, match="of a workspace of"):
        work.read(pin, 0, size)
    assert (arena == 0xAB).all(), "nothing was written"


def test_kept_reads_and_slabs_never_overlap(pin: Pin) -> None:
    work = Workspace(make_arena(512), keep=True)
    work.read(pin, 0, 200)
    with pytest.raises(MemoryError):
        work.take((65,), "F32")
    with pytest.raises(MemoryError):
        work.read(pin, 200, 300)


@pytest.mark.parametrize("size_bytes", [1001, 1002, 1007])
def test_kept_reads_are_aligned_in_an_arena_of_any_size(pin: Pin, size_bytes: int) -> None:
    work = Workspace(make_arena(size_bytes), keep=True)
    assert work.read(pin, 0, 80).view(torch.float64).shape == (10,)


@given(st.integers(0, 10_000))
def test_aligned_is_the_next_multiple_of_a_cache_line(size_bytes: int) -> None:
    assert aligned(size_bytes) % 64 == 0
    assert 0 <= aligned(size_bytes) - size_bytes < 64

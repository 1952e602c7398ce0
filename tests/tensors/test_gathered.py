"""Ranges of a file that are read to their own places: against slices of it, by the native loop and without it."""

from pathlib import Path

import numpy as np
import pytest

from mergemill.engine.errors import SourceChanged
from mergemill.engine.storage.ranges import Pin, close_all, pin_file
from mergemill.engine.tensors import native
from mergemill.engine.tensors.gathered import read_ranges

CONTENT = np.random.default_rng(1).integers(0, 256, 300_000, np.uint8)


@pytest.fixture(params=["native", "python"])
def pin(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pin:
    if request.param == "python":
        monkeypatch.setattr(native, "load", lambda: None)
    (tmp_path / "source").write_bytes(CONTENT.tobytes())
    return pin_file(tmp_path / "source")


def test_each_range_lands_in_its_place_and_nothing_beside(pin: Pin) -> None:
    order = np.random.default_rng(2).permutation(1500)  # more than are waited for at once
    sizes = np.full(1500, 130)
    sizes[::7] = 0
    offsets, into = 41 + order[::-1] * 151, np.full(1500 * 140, 7, np.uint8)
    expected = into.copy()
    for offset, place, size in zip(offsets, order * 140, sizes, strict=True):
        expected[place : place + size] = CONTENT[offset : offset + size]
    read_ranges(pin, offsets, order * 140, sizes, into)
    assert np.array_equal(into, expected)
    read_ranges(pin, *(np.empty(0, np.int64),) * 3, into)
    assert np.array_equal(into, expected)


def test_a_file_that_ends_in_a_range_has_changed(pin: Pin) -> None:
    offsets = np.array([0, 299_990, 5])
    with pytest.raises(SourceChanged, match=r"source: ends at byte (299990|300000); it was 300000 bytes at planning"):
        read_ranges(pin, offsets, offsets * 0, offsets * 0 + 11, np.empty(11, np.uint8))


def test_a_file_that_changed_is_not_read_as_the_one_that_was(pin: Pin) -> None:
    close_all()
    Path(pin.url).write_bytes(CONTENT[::-1].tobytes())
    with pytest.raises(SourceChanged):
        read_ranges(pin, np.array([3]), np.array([0]), np.array([4]), np.empty(4, np.uint8))


def test_no_range_is_read_beyond_the_memory_that_is_given(tmp_path: Path) -> None:
    if native.load() is None:
        pytest.skip("slices of Python end where their memory does")
    (tmp_path / "source").write_bytes(CONTENT.tobytes())
    with pytest.raises(ValueError, match="beyond the 9 bytes"):
        read_ranges(pin_file(tmp_path / "source"), np.array([0]), np.array([6]), np.array([4]), np.empty(9, np.uint8))
